# Copyright 2026 The GKC Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Arguments of the commands of `gkc`, without the packages that the commands need.

Help, and errors in what was typed, are answered before torch and transformers are imported, which takes seconds: each
command's own module is imported when it is run.
"""

import argparse
import importlib
from collections.abc import Callable

from ..export.formats import DEFAULT_OPSET, FORMATS
from .checks import check_new_output, check_segment
from .common import WORDS_HELP, add_model_options, add_parser, add_templates_option

TASKS = ("semantic", "instance", "panoptic")
TEXT_FOLDER = "text"

SEGMENT_EXAMPLES = f"""\
{WORDS_HELP}
examples:
  gkc segment scene.png --labels "red disc; lawn, grass; sky"
  gkc segment photos/ --model my-checkpoint --labels ade20k_150 --out cut
  gkc segment photos/ --recursive --out cut         sub-folders too; cut/ gets the same sub-folders
  gkc segment photos/ --task panoptic               the words stored in the checkpoint
  gkc segment scene.png --labels "disc; star" --void-labels "sky; lawn; square"
                                                    what is one of those three, or
  gkc segment scene.png --labels "disc; star" --void-threshold 0.4
                                                    not clearly one of the two, stays void
  gkc segment photos/ --vocab words.safetensors     words that `gkc embed` has encoded
  gkc segment photo.jpg --model my-checkpoint --task instance --threshold 0.3

For NAME.jpg it writes NAME.overlay.png (picture with outlines and a legend), NAME.labels.png (the ids: classes from 0
and void 255, or 65535 with more than 255 classes, for --task semantic; else segments from 1 and void 0) and NAME.json
(size as [height, width]; for every segment its label, score, area in pixels, bbox [x, y, width, height] and COCO
run-length encoding).

NAME is the file's name without its ending; two images of one name are refused: write them to different --out.

exit code: 0 all images done, 1 some could not be done (each is named), 2 the command was wrong or results cannot be
written, 130 stopped by Ctrl-C. What is done for an image is written whole or not at all.
"""

VOCAB_EXAMPLES = """\
examples:
  gkc vocab list
  gkc vocab show cityscapes_19
  gkc vocab show my-words.csv
  gkc vocab show ade20k_150 --json > my-words.json  a file to change, for gkc segment --labels my-words.json

Files of your own are .json, .csv (columns name, synonyms, is_thing, color; several synonyms separated by "|") or .txt
(a class per line, its synonyms after commas). Lists of FC-CLIP ("1:wall,walls" per line), id2label of a model's
config.json, and COCO's categories are read too.
"""
EMBED_EXAMPLES = f"""\
{WORDS_HELP}
examples:
  gkc embed --labels "red disc; lawn, grass" --templates photo --out words.safetensors
  gkc embed --labels ade20k_847 --templates vild14 --model mask2former-words --out ade20k.safetensors
  gkc segment photos/ --vocab words.safetensors

The file serves every checkpoint with the same text tower.
"""
CONVERT_EXAMPLES = """\
examples:
  gkc convert mask2former facebook/mask2former-swin-small-coco-panoptic \\
      --text-model openai/clip-vit-base-patch16 --class-names coco_panoptic_133 --out mask2former-words
  gkc convert clip-resnet RN50.pt --text --out clip-rn50

`gkc convert mask2former --help` and `gkc convert clip-resnet --help` explain each.
"""
MASK2FORMER_EXAMPLES = """\
The masks stay the source's. Its classes become words: asked for their names, the result answers as the source; other
words get what is close to them in the text space of CLIP (Norouzi et al., ICLR 2014). Nothing is trained, so a word
that is finer than the source's classes, such as "puppy" for "dog", gets all of the class. What no word names has low
scores: `gkc segment --void-threshold 0.3` leaves it void.

Names are encoded plain, without a prompt template, here and by the processor that is written. Asked in templates
("a photo of a dog") the source's names are other texts, and the result is near the source's, not equal to it.

Give --class-names where the source's own are codes ("wall-other-merged"): words are typed, classes separated by ";"
and several names of one thing by ","; or the name of a packaged vocabulary (`gkc vocab list`); or a .json, .csv or
.txt file. They must stand in the order of the source's classes.

examples:
  gkc convert mask2former facebook/mask2former-swin-small-coco-panoptic \\
      --text-model openai/clip-vit-base-patch16 --class-names coco_panoptic_133 --out mask2former-words
  gkc convert mask2former facebook/mask2former-swin-large-ade-semantic \\
      --text-model openai/clip-vit-large-patch14 --class-names ade20k_150 --out ade-words
  gkc convert mask2former my-mask2former/ --text-model my-clip/ --out my-words

then:
  gkc segment photo.jpg --model mask2former-words --labels "cat; sofa, couch; lamp" --task panoptic
"""
CLIP_EXAMPLES = """\
WEIGHTS is a file as OpenAI publishes it (RN50.pt, RN101.pt, RN50x4.pt, RN50x16.pt, RN50x64.pt), a dictionary of its
tensors written by torch.save, or safetensors. Nothing in the file is run. OpenAI's archives hold both towers of CLIP.

examples:
  gkc convert clip-resnet RN50.pt --out clip-rn50          the image tower
  gkc convert clip-resnet RN50.pt --text --out clip-rn50   and the text tower, in clip-rn50/text

then, in Python:
  CLIPResNetVisionModel.from_pretrained("clip-rn50")       the whole image tower
  CLIPResNetBackbone.from_pretrained("clip-rn50")          without its attention pooling, as backbone
  CLIPTextModelWithProjection.from_pretrained("clip-rn50/text")
"""
EXPORT_EXAMPLES = f"""\
{WORDS_HELP.rstrip()} A .safetensors file of `gkc embed` works too.
Without --vocab the words stored in the checkpoint are taken.

examples:
  gkc export my-checkpoint --vocab "cat; sofa, couch; lamp" --size 512 --out words-onnx
  python words-onnx/run.py words-onnx photo.jpg labels.png     numpy, Pillow and onnxruntime are all it needs
  gkc export my-checkpoint --vocab ade20k_150 --fixed --size 480x640 --out ade-onnx
  gkc export my-checkpoint --format torch-export --out program

The folder holds the graph (model.onnx or model.pt2, fp32); export.json (size, normalisation, classes with their
colours, names and shapes of inputs and outputs); for ONNX run.py, a picture to a label map without torch; and, unless
the words are --fixed, class_embeds.npz, the graph's second input: one embedding per class, of any number of classes.

Images of any number go through at once, all of --size (height x width). A picture is resized to it without keeping its
aspect, so choose a size of about the aspect of your pictures.
"""


def _run(
    module: str, function: str, check: Callable[[argparse.Namespace], None] | None = None
) -> Callable[[argparse.Namespace], int]:
    """A command's function, whose module is imported when it is called, after its check of what was typed."""

    def run(arguments: argparse.Namespace) -> int:
        if check is not None:
            check(arguments)
        return getattr(importlib.import_module(f".{module}", __package__), function)(arguments)

    return run


def add_segment(commands: argparse._SubParsersAction) -> None:
    """Add `segment` to the parser of `gkc`."""
    segment = add_parser(
        commands,
        "segment",
        "segment images with a text vocabulary",
        "Segment images with a text vocabulary: the words that you type, or those stored in the checkpoint.",
        SEGMENT_EXAMPLES,
    )
    segment.set_defaults(run=_run("segment", "segment", check_segment))
    add = segment.add_argument
    add("images", nargs="+", metavar="IMAGE", help="a picture, or a folder of pictures")
    words = segment.add_mutually_exclusive_group().add_argument
    words("--labels", metavar="WORDS", help="the words; without it, those stored in the checkpoint")
    words("--vocab", metavar="FILE", help="words encoded by `gkc embed`, instead of --labels")
    add("--void-labels", metavar="WORDS", help='words for "none of these": what they win becomes void')
    add("--void-threshold", type=_share, metavar="SCORE", help="pixels whose best score, 0 to 1, is below become void")
    add_templates_option(segment)
    task_help = "semantic: a class per pixel; instance: separate objects; panoptic: both (default: %(default)s)"
    add("--task", choices=TASKS, default="semantic", help=task_help)
    add("--recursive", action="store_true", help="also segment the pictures of a folder's sub-folders")
    add("--out", metavar="DIR", default="gkc-out", help="folder of the results (default: %(default)s)")
    add("--threshold", type=_share, help="lowest score of an instance or panoptic segment, 0 to 1 (default: 0.5)")
    add("--threads", type=_count, help="number of processor threads (default: as many as there are cores)")
    add_model_options(segment)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, got {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def add_vocab(commands: argparse._SubParsersAction) -> None:
    """Add `vocab` to the parser of `gkc`."""
    vocab = add_parser(
        commands,
        "vocab",
        "list and show vocabularies",
        "List the packaged vocabularies, and show what one, or a file of your own, says.",
        VOCAB_EXAMPLES,
    )
    actions = vocab.add_subparsers(title="actions", metavar="ACTION", required=True)
    listed = actions.add_parser("list", help="the packaged vocabularies")
    listed.set_defaults(run=_run("vocab", "list_vocabularies"))
    show = actions.add_parser("show", help="the classes of a vocabulary")
    show.set_defaults(run=_run("vocab", "show_vocabulary"))
    show.add_argument("vocabulary", metavar="NAME_OR_FILE", help="a packaged name, or a .json, .csv or .txt file")
    show.add_argument("--json", action="store_true", help="print all that is known, as a vocabulary file")


def add_embed(commands: argparse._SubParsersAction) -> None:
    """Add `embed` to the parser of `gkc`."""
    embed = add_parser(
        commands,
        "embed",
        "encode words into a file",
        "Encode words once, for many runs of `gkc segment --vocab`.",
        EMBED_EXAMPLES,
    )
    embed.set_defaults(run=_run("embed", "embed"))
    add = embed.add_argument
    add("--labels", metavar="WORDS", required=True, help="the words")
    add("--out", metavar="FILE", required=True, help="file to write, .safetensors")
    add_templates_option(embed)
    add_model_options(embed)


def add_convert(commands: argparse._SubParsersAction) -> None:
    """Add `convert` to the parser of `gkc`."""
    convert = add_parser(
        commands,
        "convert",
        "make a checkpoint of published weights",
        "Make a checkpoint of weights that others have published.",
        CONVERT_EXAMPLES,
    )
    sources = convert.add_subparsers(title="sources", metavar="SOURCE", required=True)
    _add_mask2former(sources)
    _add_clip_resnet(sources)


def _add_mask2former(sources: argparse._SubParsersAction) -> None:
    mask2former = add_parser(
        sources,
        "mask2former",
        "a Mask2Former of transformers, for any words",
        "Make a segmenter of any words out of a Mask2Former, without training.",
        MASK2FORMER_EXAMPLES,
    )
    mask2former.set_defaults(run=_run("convert", "convert_mask2former", check_new_output))
    add = mask2former.add_argument
    add("source", metavar="MASK2FORMER", help="folder, or repository of the Hub, of a Mask2Former")
    add("--text-model", metavar="CLIP", required=True, help="folder or repository of a CLIP, for its text tower")
    add("--tokenizer", metavar="CLIP", help="folder or repository of the tokenizer (default: that of --text-model)")
    add("--class-names", metavar="WORDS", help="names of the source's classes (default: those in its configuration)")
    add("--out", metavar="DIR", required=True, help="new folder of the checkpoint")
    add("--allow-pickle", action="store_true", help="also read pytorch_model.bin where there is no safetensors file")


def _add_clip_resnet(sources: argparse._SubParsersAction) -> None:
    clip_resnet = add_parser(
        sources,
        "clip-resnet",
        "a CLIP ResNet of OpenAI, as backbone, teacher and text tower",
        "Make checkpoints out of OpenAI's weights of a CLIP ResNet.",
        CLIP_EXAMPLES,
    )
    clip_resnet.set_defaults(run=_run("convert", "convert_clip_resnet", check_new_output))
    add = clip_resnet.add_argument
    add("weights", metavar="WEIGHTS", help="file of the weights")
    add("--out", metavar="DIR", required=True, help="new folder of the image tower")
    add("--text", action="store_true", help=f"also write the text tower, into DIR/{TEXT_FOLDER}")
    add("--allow-jit", action="store_true", help="let torch open the archive, which runs code in it")


def add_export(commands: argparse._SubParsersAction) -> None:
    """Add `export` to the parser of `gkc`."""
    export = add_parser(
        commands,
        "export",
        "write a graph for onnxruntime or torch.export",
        "Write a checkpoint's image path and words as a graph that runs without this library.",
        EXPORT_EXAMPLES,
    )
    export.set_defaults(run=_run("export", "export", check_new_output))
    add = export.add_argument
    add("model", nargs="?", metavar="DIR", help="checkpoint (default: GKC_MODEL, or the one shipped with gkc)")
    add("--out", metavar="DIR", required=True, help="new folder to write")
    add("--format", choices=list(FORMATS), default="onnx", help="kind of graph (default: %(default)s)")
    add("--size", metavar="SIDE|HxW", default="512", help="pixels, multiples of 32 (default: %(default)s)")
    add("--vocab", "--labels", metavar="WORDS", help="the words; without it, those stored in the checkpoint")
    add("--fixed", action="store_true", help="bake the words into the graph")
    add_templates_option(export)
    opset_help = f"version of ONNX's operators, at least {DEFAULT_OPSET} (default: %(default)s)"
    add("--opset", type=int, default=DEFAULT_OPSET, metavar="N", help=opset_help)
    check_help = "compare with the model on a random image (default: if onnxruntime is installed)"
    add("--check", action=argparse.BooleanOptionalAction, help=check_help)


__all__ = ["TASKS", "TEXT_FOLDER", "add_convert", "add_embed", "add_export", "add_segment", "add_vocab"]
