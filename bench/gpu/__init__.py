"""What a card makes of the kernels, beside what else runs on it: one command, one JSON.

    python -m bench.gpu prepare gpu.tar.xz [--target cuda:sm_90]    anywhere: binaries and plans
    python -m bench.gpu run gpu.tar.xz [PART ...] --out gpu.json    on the card, under 8 minutes
    python -m bench.gpu model gpu.tar.xz --card H200                what the model says, anywhere

The card's machine needs this checkout, which with the archive has at most 64 MiB, Python with numpy
and ml_dtypes, and a driver; for what is compared, and for what is held against references, torch of
any version. No Triton, no compiler. Weights of large models are made there of random blocks that
are repeated, those of the tiny one of its checkpoint.

Each part (`parts`) is a process of its own with a budget, so that neither an error of the device
nor a kernel that never ends takes anything from the others, and the file is written anew after
each: what was found stays. `bars` says for each figure that was promised whether it holds.
"""
