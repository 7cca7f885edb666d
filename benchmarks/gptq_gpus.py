"""Time of layer-wise GPTQ by one process and by several, each with a GPU of its own where there are GPUs.

    python benchmarks/gptq_gpus.py [SOURCE] [--frames 32000] [--sequence 250] [--processes 1 2] [--folder DIR]

Quantizes all matrices of a source (demo:7b, which is made first) on random tokens, as a conversion does, each number of
processes in a fresh Python. Prints the seconds from the first pass to the last matrix in the store, how many times as
fast that is as the first number, and the largest memory: on the GPU of each process, and resident in all of them
together. On a machine without GPUs the processes divide the processors.
"""

import argparse
import json
import shutil
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from ppx.calibrate import layerwise_processes
from ppx.calibrate.dataset import write
from ppx.calibrate.layerwise import quantize_model
from ppx.calibrate.layerwise_processes import Task
from ppx.calibrate.processes import compute_together
from ppx.calibrate.workers import Workers
from ppx.convert import preparation
from ppx.convert.bundle.plan import make_plan
from ppx.convert.bundle.quantized_store import QuantizedStore
from ppx.convert.bundle.recipe import uniform
from ppx.convert.source.source import locate, open_source
from ppx.model.tokens import read_tokens
from ppx.quant.affine import QuantizationConfig
from processes import run
