"""Triton: kernels for NVIDIA and AMD GPUs, compiled ahead of time with no GPU present.

Importing this package imports neither triton nor a driver. How a program becomes an artifact:

    lower/       each operator to launches of kernels, views without copies; regions.py says which
                 kernel is generated for a region, or for an operator that is one alone;
                 context.py has the state that they share, effects.py says what kernels write
    kernels/     the templates: products, attention, experts, lookups, scans, sampling
    slots.py     what stands in a template's places: prologue.py is what is done to rows before a
                 product, codes.py and coded_rows.py read and sum codes, epilogue.py is what follows
                 on a tile, wanted.py who stores codes for whom, coded_cache.py caches in codes
    rows.py      the generator for operators along rows and chains of elements; row_text.py writes
                 its lines, pointwise.py has the formulas of both
    blocks.py    block sizes by target, the interpreter's among them, and what else could be taken;
                 tuning.py finds the fastest, tuner.py on a card, for which choices.py keeps them;
                 devices.py what is known of architectures and cards
    program.py   all entries to launches (launch.py) in a plan
    compile.py   launches' kernels to cubin and hsaco, in a process of its own (compile_worker.py);
                 dependent.py has them begin early
    schedule.py  launches to addresses and grids, once the shapes of a call are known
    client.py    runs them in Triton's interpreter (any machine; worker.py, interpret.py), access.py
                 with every access watched
    device.py    runs them on a GPU, by driver.py or hip.py; held.py is what stays there, weights.py
                 what several share, within what memory.py counts; timer.py times launches, timed.py
                 tells profiles of them, nvtx.py names them to tools, runner.py is run.py's part
    report.py    what kernels take and steps could take on cards, by assembly.py and modelled.py
"""

from dsc.backends.triton.backend import TritonBackend

__all__ = ["TritonBackend"]
