"""What a run will need before it has a GPU: memory, FLOPs, communication, time, storage.

Memory is computed as this trainer and DeepSpeed 0.19 use it, and tests compare it with runs. Times are estimates.
"""
