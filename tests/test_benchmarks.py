"""The benchmarks of whole steps: they run, and the table says what was measured."""

import json
import subprocess
import sys

import pytest
