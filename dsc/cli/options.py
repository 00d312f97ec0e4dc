"""The options that several verbs share, declared once with their help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

from dsc.ir.types import Precision

unset = partial(Option, show_default=False)
"""An option whose help says itself what leaving it out means."""

Model = Annotated[
    str,
    Argument(
        metavar="MODEL",
        help="A checkpoint folder, ORG/NAME of the Hugging Face Hub, a .py file with build(config),"
        " a .dsc text, or a built-in name.",
        show_default=False,
    ),
]
Artifact = Annotated[
    Path, Argument(metavar="OUT", help="A folder that dsc compile wrote.", show_default=False)
]
Runnable = Annotated[
    str,
    Argument(
        metavar="OUT|MODEL",
        help="A folder that dsc compile wrote, or a model as dsc compile takes it, compiled first.",
        show_default=False,
    ),
]
Config = Annotated[
    str | None,
    unset(
        "--config",
        metavar="NAME|FILE",
        help="A built-in configuration or a config.json.  [default: tiny, with its weights]",
    ),
]
Weights = Annotated[
    str | None,
    unset(
        "--weights",
        metavar="DIR|none",
        help="Where the safetensors files are; 'none' compiles without any.",
    ),
]
Revision = Annotated[
    str | None,
    unset(
        "--revision",
        metavar="REV",
        help="A branch, a tag or a commit of ORG/NAME.  [default: main]",
    ),
]
Backend = Annotated[
    str | None,
    unset(
        "--backend",
        metavar="NAME",
        help="triton, tvm, onnxruntime, reference or null.  [default: the best that runs here]",
    ),
]
Targets = Annotated[
    list[str] | None,
    unset(
        "--target",
        metavar="T",
        help="cpu, cpu:znver4, cuda:sm_90, hip:gfx942, …; repeat for several.  [default: auto]",
    ),
]
FusionLevel = Annotated[
    int,
    Option(
        "--fusion-level",
        min=0,
        max=3,
        help="0: a kernel an operator; 1: pointwise chains; 2: into GEMMs; 3: everything."
        " onnxruntime fuses by itself, whatever the level.",
    ),
]
Dtype = Annotated[
    Precision | None, unset("--dtype", help="Compute dtype.  [default: the checkpoint's]")
]
MaxBatch = Annotated[
    int | None, unset("--max-batch", min=1, help="Sequences in one step.  [default: 4]")
]
MaxContext = Annotated[
    int | None,
    unset("--max-context", min=1, help="Tokens a sequence may hold.  [default: the model's limit]"),
]
RopeScaling = Annotated[
    str | None,
    unset(
        "--rope-scaling",
        metavar="KIND:FACTOR",
        help="Extend a checkpoint's context: yarn:4, linear:2, llama3:8.  [default: its own]",
    ),
]
PrefillChunk = Annotated[
    int, Option("--prefill-chunk", min=1, help="Tokens of a prompt processed at once.")
]
Cache = Annotated[
    Literal["contiguous", "paged"],
    Option(
        "--cache",
        help="contiguous: max-context rows a sequence; paged: pages of 64 rows, taken on demand.",
    ),
]
CacheFormat = Annotated[
    Literal["bf16", "fp8", "int8"],
    Option(
        "--cache-format",
        help="Latent caches as codes with a scale for 128 elements of a row, rope keys beside them"
        " (tvm, triton, reference, null); bf16: in the compute type.",
    ),
]
Threads = Annotated[
    int | None,
    unset("--threads", min=1, help="CPU threads.  [default: the cores this process may use]"),
]
Pin = Annotated[
    bool | None,
    unset(
        "--pin/--no-pin",
        help="Worker threads on a core each, or free to move.  [default: the runtime's]",
    ),
]
Tune = Annotated[
    bool,
    Option(
        "--tune/--no-tune",
        help="Time a few ways to cut products on this CPU (tvm; kept between runs), take what"
        " dsc tune found on this card (triton), or the rules'.",
    ),
]
Fallback = Annotated[
    str | None,
    unset(
        "--fallback",
        metavar="BACKEND",
        help="Where the backend refuses an operator, compile the whole program for this one.",
    ),
]
Ranks = Annotated[
    int | None,
    unset(
        "--ranks",
        min=1,
        help="Processes that run the model together, each with its part of the weights.",
    ),
]
Parallel = Annotated[
    Literal["tp+ep", "tp", "ep"] | None,
    unset(
        "--parallel",
        help="How ranks share it. tp: heads, rows, vocabulary and experts split; ep: experts dealt"
        " out; tp+ep: experts dealt out, the rest split.  [default: tp+ep]",
    ),
]
Quant = Annotated[
    Literal["none", "fp8", "int8", "int4"],
    Option(
        "--quant",
        help="Store weights of linears and experts in FP8, in blocks of 128 x 128 as V3, or as"
        " integers, a scale for a group of columns of a row (the head's in 8 bits).",
    ),
]
Keep = Annotated[
    list[str] | None,
    unset(
        "--keep",
        metavar="GLOB",
        help="Weights that --quant leaves: lm_head, model.layers.0, '*.self_attn.*'; with :int8"
        " behind it, in 8 bits under int4; lm_head:fp8 has FP8 take the head; repeatable.",
    ),
]
GroupSize = Annotated[
    int | None,
    unset(
        "--group-size",
        min=2,
        help="Columns of a row that share a scale under --quant: 32, on onnxruntime 128.",
    ),
]
QuantEmbedding = Annotated[
    Literal["none", "int8", "int4"],
    Option(
        "--quant-embedding",
        help="Store the embedding's table as integers too, with the head where that is tied to it"
        " (onnxruntime, triton, reference, null).",
    ),
]
ActivationBits = Annotated[
    Literal["8", "16"],
    Option(
        "--activation-bits",
        help="8: rows that codes multiply are codes too, where kernels take them; 16: they"
        " stay in the compute type.",
    ),
]
Calibrate = Annotated[
    Path | None,
    unset(
        "--calibrate",
        metavar="TEXT",
        exists=True,
        dir_okay=False,
        help="Run the model on this text with each product of --quant quantised alone, show what"
        " that costs, and keep the worst as far as --avg-bits allows.",
    ),
]
NSamples = Annotated[
    int, Option("--nsamples", min=1, help="Windows of the text that --calibrate takes.")
]
SeqLen = Annotated[
    int | None,
    unset("--seqlen", min=2, help="Tokens of each window.  [default: 256, or what a step takes]"),
]
AvgBits = Annotated[
    float | None,
    unset(
        "--avg-bits",
        help="Bits a weight of linears and experts, scales counted, up to which --calibrate keeps"
        " the worst: of int4 in 8 bits first, then in the compute type.  [default: 0.5 more than"
        " --quant takes]",
    ),
]
Stop = Annotated[
    list[str] | None,
    unset(
        "--stop",
        metavar="TEXT",
        help="End an answer before this text, besides the model's stop ids; repeatable.",
    ),
]
Greedy = Annotated[
    bool, Option("--greedy", help="The likeliest token, always, whatever the model's default.")
]
Temperature = Annotated[
    float | None,
    unset(
        "--temperature",
        min=0.0,
        help="Draw, from softmax(logits / temperature); 0: as --greedy.  [default: the model's own,"
        " else greedy; so for the next four]",
    ),
]
TopK = Annotated[
    int | None, unset("--top-k", min=0, help="Draw from so many likeliest tokens; 0: all.")
]
TopP = Annotated[
    float | None,
    unset(
        "--top-p",
        min=0.0,
        max=1.0,
        help="Draw from the likeliest tokens that have this probability together.",
    ),
]
MinP = Annotated[
    float | None,
    unset(
        "--min-p",
        min=0.0,
        max=1.0,
        help="Draw from tokens with at least this share of the likeliest one's probability.",
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    unset(
        "--repetition-penalty",
        min=0.01,
        help="Above 1: tokens of the text so far become less likely, also with --greedy.",
    ),
]
PresencePenalty = Annotated[
    float | None,
    unset(
        "--presence-penalty",
        min=-2.0,
        max=2.0,
        help="Taken from the logits of tokens that were generated, also with --greedy.",
    ),
]
FrequencyPenalty = Annotated[
    float | None,
    unset(
        "--frequency-penalty",
        min=-2.0,
        max=2.0,
        help="The same for each time that they were.",
    ),
]
Seed = Annotated[int, Option("--seed", min=0, help="Of the draws.")]
PrintIrAfter = Annotated[
    list[str] | None,
    unset(
        "--print-ir-after",
        metavar="PASS|all",
        help="Print the text IR after this pass; repeatable.",
    ),
]
DumpDir = Annotated[
    Path | None,
    unset(
        "--dump-dir",
        metavar="D",
        help="Write numbered text IR, one file a pass, and passes.txt: what ran, for dsc opt -p.",
    ),
]
VerifyEach = Annotated[
    bool,
    Option("--verify-each", help="Interpret the program before and after every pass and compare."),
]
Json = Annotated[bool, Option("--json", help="Print one JSON document on standard output.")]
Force = Annotated[bool, Option("--force", help="Replace the folder at OUT.")]
Trust = Annotated[
    bool,
    Option("--trust", help="Load code that this user did not build."),
]
KeepIn = Annotated[
    Path | None,
    unset(
        "-o",
        "--output",
        metavar="OUT",
        help="Where what is compiled of a MODEL is kept.  [default: nowhere]",
    ),
]
Output = Annotated[
    Path | None,
    unset(
        "-o", "--output", metavar="OUT", help="Where the artifact goes.  [default: ./MODEL-BACKEND]"
    ),
]


SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty",
)  # fmt: skip
"""Options of verbs that write text: how tokens are drawn."""
COMPILING = ("backend", "dtype", "max_context", "rope_scaling", "revision", "quant")
"""Those that a MODEL is compiled with first."""
RUNNING = ("trust", "threads", "pin")


def among(given: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return of a verb's options, by name, the `names` that were given and say something."""
    return {name: given[name] for name in names if given[name] not in (None, "none")}


def chosen(**asked: Any) -> dict[str, Any]:
    """Return the options that were given on the command line."""
    return {name: value for name, value in asked.items() if value is not None}
