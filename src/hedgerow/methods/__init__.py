"""The methods: one file per paper, each reading like the paper's algorithm.

To add one, put a subclass of `hedgerow.methods.base.Method` (or `LoraMethod`) into a file here, or
anywhere: `method: {name: "package.module:Class"}`, as in `examples/own_method.py`.
`hedgerow.testing.check_method` checks what it promises.
"""

from __future__ import annotations

from hedgerow.methods.base import Method
from hedgerow.methods.centralized import Centralized
from hedgerow.methods.demo_sgd import DemoSGD
from hedgerow.methods.diloco import DiLoCo
from hedgerow.methods.ditto import Ditto
from hedgerow.methods.fed_sb import FedSB
from hedgerow.methods.fedadam import FedAdam
from hedgerow.methods.fedavg import FedAvg
from hedgerow.methods.fedex_lora import FedExLoRA
from hedgerow.methods.fedit import FedIT
from hedgerow.methods.fedkseed import FedKSeed
from hedgerow.methods.fedprox import FedProx
from hedgerow.methods.fedsa_lora import FedSALoRA
from hedgerow.methods.fedsvd import FedSVD
from hedgerow.methods.fedzo import FedZO
from hedgerow.methods.ferret import Ferret
from hedgerow.methods.ffa_lora import FFALoRA
from hedgerow.methods.flexlora import FlexLoRA
from hedgerow.methods.flora import FLoRA
from hedgerow.methods.flora_adalora import FLoRAAdaLoRA
from hedgerow.methods.florist import FLoRIST
from hedgerow.methods.rolora import RoLoRA
from hedgerow.methods.scaffold import Scaffold
from hedgerow.methods.sparseloco import SparseLoCo
from hedgerow.methods.standalone import Standalone
from hedgerow.methods.stc import STC
from hedgerow.methods.zero_padding import ZeroPadding
from hedgerow.plugins import Registry

METHODS: Registry[Method] = Registry("method", Method, "hedgerow.methods", see="hedgerow methods")
"""Every method by the name that the experiment file uses, installed plug-ins included."""

__all__ = [
    "METHODS",
    "STC",
    "Centralized",
    "DemoSGD",
    "DiLoCo",
    "Ditto",
    "FFALoRA",
    "FLoRA",
    "FLoRAAdaLoRA",
    "FLoRIST",
    "FedAdam",
    "FedAvg",
    "FedExLoRA",
    "FedIT",
    "FedKSeed",
    "FedProx",
    "FedSALoRA",
    "FedSB",
    "FedSVD",
    "FedZO",
    "Ferret",
    "FlexLoRA",
    "Method",
    "RoLoRA",
    "Scaffold",
    "SparseLoCo",
    "Standalone",
    "ZeroPadding",
]
