"""Starting jobs: a script for each launcher, and the supervisor that restarts what they start."""
