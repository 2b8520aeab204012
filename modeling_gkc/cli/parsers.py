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
"""Argument parsers of the `gkc` commands.

The module of a command is imported only when the command runs, so that `--help` and argument errors do not import
torch and transformers, which takes seconds.
"""

import argparse
import importlib
from collections.abc import Callable

from ..export.formats import DEFAULT_OPSET, FORMATS
from .checks import check_new_output, check_segment
from .common import WORDS_HELP, add_model_options, add_parser, add_templates_option, positive

TASKS = ("semantic", "instance", "panoptic")
TEXT_FOLDER = "text"
CLIP_TOKENIZER = "openai/clip-vit-base-patch16"
ENSEMBLES = ("none", "average", "geometric")
CLASS_SCORES = ("segmenter", "regions", "both")

SEGMENT_EXAMPLES = f"""\
{WORDS_HELP}
examples:
  gkc segment scene.png --labels "red disc; lawn, grass; sky"
  gkc segment photos/ --model my-checkpoint --labels ade20k_150 --out segmented
  gkc segment photos/ --recursive --out segmented       include sub-folders; segmented/ gets the same sub-folders
  gkc segment photos/ --task panoptic                   use the vocabulary stored in the checkpoint
  gkc segment scene.png --labels "disc; star" --void-labels "sky; lawn; square"
                                                        leave pixels of sky, lawn and square void
  gkc segment scene.png --labels "disc; star" --void-threshold 0.4
                                                        leave uncertain pixels void
  gkc segment photos/ --vocab words.safetensors         use a vocabulary encoded by `gkc embed`
  gkc segment photo.jpg --model my-checkpoint --task instance --threshold 0.3

output files for each image NAME.jpg:
  NAME.overlay.png   the image with outlines and a legend
  NAME.labels.png    the ids of the pixels. semantic: class ids from 0, void is 255 (65535 with more than 255 classes);
                     instance and panoptic: segment ids from 1, void is 0
  NAME.json          size as [height, width] and, for each segment, its label, score, area in pixels, bounding box
                     [x, y, width, height] and COCO run-length encoding

Two images with the same NAME are an error, because their results would overwrite each other: use two --out folders.

exit codes: 0 all images segmented; 1 some images failed (each is named); 2 wrong arguments, or results cannot be
written; 130 interrupted by Ctrl-C. The files of an image are written completely or not at all.
"""

VOCAB_EXAMPLES = """\
examples:
  gkc vocab list
  gkc vocab show cityscapes_19
  gkc vocab show my-words.csv
  gkc vocab show ade20k_150 --json > my-words.json   write a file to edit, for --labels my-words.json

Vocabulary files are .json, .csv (columns name, synonyms, is_thing, color; synonyms separated by "|") or .txt (one
class per line, its synonyms after commas). FC-CLIP's lists ("1:wall,walls" per line), the id2label of a config.json
and the categories of a COCO file are read, too.
"""
EMBED_EXAMPLES = f"""\
{WORDS_HELP}
examples:
  gkc embed --labels "red disc; lawn, grass" --templates photo --out words.safetensors
  gkc embed --labels ade20k_847 --templates vild14 --model mask2former-words --out ade20k.safetensors
  gkc segment photos/ --vocab words.safetensors

The file works with every checkpoint that has the same text encoder.
"""
CONVERT_EXAMPLES = """\
examples:
  gkc convert mask2former facebook/mask2former-swin-small-coco-panoptic \\
      --text-model openai/clip-vit-base-patch16 --class-names coco_panoptic_133 --out mask2former-words
  gkc convert fc-clip fcclip_cocopan.pth --clip open_clip_model.safetensors --out fc-clip-l
  gkc convert clip-resnet RN50.pt --text --out clip-rn50

See also `gkc convert mask2former --help`, `gkc convert fc-clip --help` and `gkc convert clip-resnet --help`, and
`gkc open --help` for a segmenter whose regions are named by an image-text model.
"""
MASK2FORMER_EXAMPLES = """\
The masks are those of the source model. The class probabilities of each segment are distributed over your words by
the distances of their CLIP text embeddings to those of the source's classes (based on ConSE, Norouzi et al., ICLR
2014). Nothing is trained. With the source's own class names, the result equals that of the source. Other words get the
masks of the closest classes, so that "puppy" gets all of "dog". Pixels that fit none of the words have low scores:
`gkc segment --void-threshold 0.3` leaves them void.

Names are encoded without a prompt template, both here and by the processor of the new checkpoint. With templates ("a
photo of a dog"), the result is close to that of the source, but not equal.

Use --class-names if the source's own names are codes ("wall-other-merged"). Type the names, separated by ";" between
classes and "," between synonyms, or give a packaged vocabulary (`gkc vocab list`) or a .json, .csv or .txt file. They
must be in the order of the source's classes.

examples:
  gkc convert mask2former facebook/mask2former-swin-small-coco-panoptic \\
      --text-model openai/clip-vit-base-patch16 --class-names coco_panoptic_133 --out mask2former-words
  gkc convert mask2former facebook/mask2former-swin-large-ade-semantic \\
      --text-model openai/clip-vit-large-patch14 --class-names ade20k_150 --out ade-words
  gkc convert mask2former my-mask2former/ --text-model my-clip/ --out my-words

use the result:
  gkc segment photo.jpg --model mask2former-words --labels "cat; sofa, couch; lamp" --task panoptic
"""
OPEN_EXAMPLES = """\
SEGMENTER predicts the masks: a Mask2Former, MaskFormer, OneFormer or EoMT of transformers, or a GKC checkpoint. TOWER
compares each region with your words: a CLIP, MetaCLIP 2 or SigLIP of transformers, or a CLIP ResNet that `gkc convert
clip-resnet --text` wrote. Nothing is trained.

--class-scores segmenter   distribute the segmenter's probabilities over your words, as `gkc convert mask2former` does
--class-scores regions     compare the regions with your words
--class-scores both        average the logarithms of both (default)

Use --class-names if the segmenter's own names are codes ("wall-other-merged"), as for `gkc convert mask2former`.

examples:
  gkc open facebook/mask2former-swin-small-coco-panoptic --with openai/clip-vit-base-patch16 \\
      --class-names coco_panoptic_133 --out any-words
  gkc open tue-mps/coco_panoptic_eomt_large_640 --with google/siglip2-base-patch16-224 \\
      --class-names coco_panoptic_133 --out eomt-siglip2
  gkc open my-mask2former/ --with clip-rn50 --tokenizer openai/clip-vit-base-patch16 --out my-words

use the result:
  gkc segment photo.jpg --model any-words --labels "cat; sofa, couch; lamp" --task panoptic
"""
CLIP_EXAMPLES = """\
WEIGHTS is an archive published by OpenAI (RN50.pt, RN101.pt, RN50x4.pt, RN50x16.pt, RN50x64.pt), a state dictionary
saved by torch.save, or a safetensors file. No code in the file is run. OpenAI's archives hold both towers of CLIP.

examples:
  gkc convert clip-resnet RN50.pt --out clip-rn50          the image encoder
  gkc convert clip-resnet RN50.pt --text --out clip-rn50   also the text encoder, in clip-rn50/text

use the result in Python:
  CLIPResNetVisionModel.from_pretrained("clip-rn50")       image encoder with attention pooling
  CLIPResNetBackbone.from_pretrained("clip-rn50")          backbone without attention pooling
  CLIPTextModelWithProjection.from_pretrained("clip-rn50/text")
"""
FC_CLIP_EXAMPLES = """\
The result equals that of FC-CLIP's published code with its 14 prompts per name. No code in the files is run.

CHECKPOINT is one of FC-CLIP's published files. That of ConvNeXt-L holds no CLIP weights: give OpenCLIP's file of
convnext_large_d_320 (laion2b_s29b_b131k_ft_soup) with --clip. For the ResNets, OpenAI's archive or OpenCLIP's file
can be given if the checkpoint holds none.

--class-names are the names of the classes that the checkpoint was trained on, with their synonyms. They become the
stored words, and with --ensemble the seen classes. For FC-CLIP's own synonyms, give its list of names
coco_panoptic_with_prompt_eng.txt.

--ensemble combines the learned classifier with CLIP's frozen head. The published numbers need "geometric". A patent
application (US 2025/0045929) describes the geometric ensembling of such features: check whether you may use it.

examples:
  gkc convert fc-clip fcclip_cocopan.pth --clip open_clip_model.safetensors --out fc-clip-l
  gkc convert fc-clip fcclip_cocopan_r50.pth --clip RN50.pt --ensemble geometric --out fc-clip-r50

use the result:
  gkc segment photo.jpg --model fc-clip-l --labels "cat; sofa, couch; lamp" --task panoptic
"""
EXPORT_EXAMPLES = f"""\
{WORDS_HELP.rstrip()} A .safetensors file written by `gkc embed`
works, too.

examples:
  gkc export my-checkpoint --vocab "cat; sofa, couch; lamp" --size 512 --out words-onnx
  python words-onnx/run.py words-onnx photo.jpg labels.png     needs numpy, Pillow and onnxruntime only
  gkc export my-checkpoint --vocab ade20k_150 --fixed --size 480x640 --out ade-onnx
  gkc export my-checkpoint --format torch-export --out program

output files:
  model.onnx, model.pt2   the graph in fp32. It takes any number of images at once
  export.json             image size, normalization, classes with colors, names and shapes of inputs and outputs
  class_embeds.npz        second input of the graph: one embedding per class, any number of classes; not with --fixed
  run.py                  image file to label map without torch; for ONNX

Images are resized to --size without keeping their aspect ratio: choose a size with about the aspect of your images.
"""


def _run(
    module: str, function: str, check: Callable[[argparse.Namespace], None] | None = None
) -> Callable[[argparse.Namespace], int]:
    """Return a function that checks the arguments, imports the command's module and runs the command."""

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
        "Segment images with a text vocabulary: the given words, or those stored in the checkpoint.",
        SEGMENT_EXAMPLES,
    )
    segment.set_defaults(run=_run("segment", "segment", check_segment))
    add = segment.add_argument
    add("images", nargs="+", metavar="IMAGE", help="image file, or folder of images")
    words = segment.add_mutually_exclusive_group().add_argument
    words("--labels", metavar="WORDS", help="words to segment (default: those stored in the checkpoint)")
    words("--vocab", metavar="FILE", help="vocabulary encoded by `gkc embed`, instead of --labels")
    add("--void-labels", metavar="WORDS", help="words for other content; pixels that they fit best become void")
    void_help = "lowest score, 0 to 1, of a pixel's best class; other pixels become void"
    add("--void-threshold", type=_fraction, metavar="SCORE", help=void_help)
    add_templates_option(segment)
    task_help = "semantic: one class per pixel; instance: separate objects; panoptic: both (default: %(default)s)"
    add("--task", choices=TASKS, default="semantic", help=task_help)
    add("--recursive", action="store_true", help="include the images in sub-folders")
    add("--out", metavar="DIR", default="gkc-out", help="output folder (default: %(default)s)")
    threshold_help = "lowest score, 0 to 1, of an instance or panoptic segment (default: 0.5)"
    add("--threshold", type=_fraction, metavar="SCORE", help=threshold_help)
    add("--threads", type=positive, metavar="N", help="number of CPU threads (default: number of cores)")
    add_model_options(segment)


def _fraction(text: str) -> float:
    """Parse a number between 0 and 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, got {text}")
    return value


def add_vocab(commands: argparse._SubParsersAction) -> None:
    """Add `vocab` to the parser of `gkc`."""
    vocab = add_parser(
        commands,
        "vocab",
        "list and show vocabularies",
        "List the packaged vocabularies, or show the classes of one or of a file.",
        VOCAB_EXAMPLES,
    )
    actions = vocab.add_subparsers(title="actions", metavar="ACTION", required=True)
    listed = actions.add_parser("list", help="list the packaged vocabularies")
    listed.set_defaults(run=_run("vocab", "list_vocabularies"))
    show = actions.add_parser("show", help="show the classes of a vocabulary")
    show.set_defaults(run=_run("vocab", "show_vocabulary"))
    show.add_argument("vocabulary", metavar="NAME_OR_FILE", help="packaged vocabulary, or a .json, .csv or .txt file")
    show.add_argument("--json", action="store_true", help="print a complete vocabulary file in JSON")


def add_embed(commands: argparse._SubParsersAction) -> None:
    """Add `embed` to the parser of `gkc`."""
    embed = add_parser(
        commands,
        "embed",
        "encode a vocabulary into a file",
        "Encode a vocabulary once, to use it many times with `gkc segment --vocab`.",
        EMBED_EXAMPLES,
    )
    embed.set_defaults(run=_run("embed", "embed"))
    add = embed.add_argument
    add("--labels", metavar="WORDS", required=True, help="words to encode")
    add("--out", metavar="FILE", required=True, help=".safetensors file to write")
    add_templates_option(embed)
    add_model_options(embed)


def add_convert(commands: argparse._SubParsersAction) -> None:
    """Add `convert` to the parser of `gkc`."""
    convert = add_parser(
        commands,
        "convert",
        "convert published weights to a checkpoint",
        "Convert published weights of other projects to a checkpoint of this library.",
        CONVERT_EXAMPLES,
    )
    sources = convert.add_subparsers(title="sources", metavar="SOURCE", required=True)
    _add_mask2former(sources)
    _add_clip_resnet(sources)
    _add_fc_clip(sources)


def _add_mask2former(sources: argparse._SubParsersAction) -> None:
    mask2former = add_parser(
        sources,
        "mask2former",
        "convert a Mask2Former of transformers to an open-vocabulary segmenter",
        "Convert a Mask2Former to an open-vocabulary segmenter, without training.",
        MASK2FORMER_EXAMPLES,
    )
    mask2former.set_defaults(run=_run("convert", "convert_mask2former", check_new_output))
    add = mask2former.add_argument
    add("source", metavar="MASK2FORMER", help="folder or Hub repository of a Mask2Former")
    add(
        "--text-model",
        metavar="CLIP",
        required=True,
        help="folder or Hub repository of the CLIP whose text encoder is used",
    )
    add("--tokenizer", metavar="CLIP", help="folder or Hub repository of the tokenizer (default: --text-model)")
    add("--class-names", metavar="WORDS", help="names of the source's classes (default: from its configuration)")
    add("--out", metavar="DIR", required=True, help="new folder for the checkpoint")
    pickle_help = "read pytorch_model.bin if there is no safetensors file"
    add("--allow-pickle", action="store_true", help=pickle_help)


def _add_clip_resnet(sources: argparse._SubParsersAction) -> None:
    clip_resnet = add_parser(
        sources,
        "clip-resnet",
        "convert a CLIP ResNet of OpenAI to a backbone, a teacher and a text encoder",
        "Convert OpenAI's weights of a CLIP ResNet to checkpoints.",
        CLIP_EXAMPLES,
    )
    clip_resnet.set_defaults(run=_run("convert", "convert_clip_resnet", check_new_output))
    add = clip_resnet.add_argument
    add("weights", metavar="WEIGHTS", help="file with the weights")
    add("--out", metavar="DIR", required=True, help="new folder for the image encoder")
    add("--text", action="store_true", help=f"also convert the text encoder, to DIR/{TEXT_FOLDER}")
    add("--allow-jit", action="store_true", help="open the archive with torch.jit, which runs code in it")


def _add_fc_clip(sources: argparse._SubParsersAction) -> None:
    fc_clip = add_parser(
        sources,
        "fc-clip",
        "convert an FC-CLIP checkpoint to an open-vocabulary segmenter",
        "Convert a published FC-CLIP checkpoint to an open-vocabulary segmenter.",
        FC_CLIP_EXAMPLES,
    )
    fc_clip.set_defaults(run=_run("convert", "convert_fc_clip", check_new_output))
    add = fc_clip.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="file with the weights of FC-CLIP")
    add("--clip", metavar="FILE", help="file with the CLIP weights (default: those in CHECKPOINT)")
    tokenizer_help = "folder or Hub repository of CLIP's tokenizer (default: %(default)s)"
    add("--tokenizer", metavar="CLIP", default=CLIP_TOKENIZER, help=tokenizer_help)
    names_help = "names of the training classes (default: %(default)s)"
    add("--class-names", metavar="WORDS", default="coco_panoptic_133", help=names_help)
    ensemble_help = "combination with CLIP's frozen head (default: %(default)s)"
    add("--ensemble", choices=ENSEMBLES, default="none", help=ensemble_help)
    add("--out", metavar="DIR", required=True, help="new folder for the checkpoint")


def add_open(commands: argparse._SubParsersAction) -> None:
    """Add `open` to the parser of `gkc`."""
    open_parser = add_parser(
        commands,
        "open",
        "make a segmenter for any words from a segmenter and a CLIP",
        "Make an open-vocabulary segmenter of a segmenter and an image-text model, without training.",
        OPEN_EXAMPLES,
    )
    open_parser.set_defaults(run=_run("open", "open_command", check_new_output))
    add = open_parser.add_argument
    add("segmenter", metavar="SEGMENTER", help="folder or Hub repository of the segmenter")
    tower_help = "folder or Hub repository of the image-text model"
    add("--with", dest="tower", metavar="TOWER", required=True, help=tower_help)
    add("--class-names", metavar="WORDS", help="names of the segmenter's classes (default: from its configuration)")
    scores_help = "source of the class scores (default: both)"
    add("--class-scores", choices=CLASS_SCORES, help=scores_help)
    text_help = f"folder or Hub repository of the text encoder of a CLIP ResNet (default: TOWER/{TEXT_FOLDER})"
    add("--text-model", metavar="CLIP", help=text_help)
    add("--tokenizer", metavar="CLIP", help="folder or Hub repository of the tokenizer (default: TOWER)")
    add("--out", metavar="DIR", required=True, help="new folder for the checkpoint")
    add("--allow-pickle", action="store_true", help="read pytorch_model.bin if there is no safetensors file")


def add_export(commands: argparse._SubParsersAction) -> None:
    """Add `export` to the parser of `gkc`."""
    export = add_parser(
        commands,
        "export",
        "export a checkpoint to ONNX or torch.export",
        "Export a checkpoint and a vocabulary as a graph that runs without this library.",
        EXPORT_EXAMPLES,
    )
    export.set_defaults(run=_run("export", "export", check_new_output))
    add = export.add_argument
    add(
        "model",
        nargs="?",
        metavar="DIR",
        help="folder of the checkpoint (default: $GKC_MODEL, or the shipped checkpoint)",
    )
    add("--out", metavar="DIR", required=True, help="new output folder")
    add("--format", choices=list(FORMATS), default="onnx", help="graph format (default: %(default)s)")
    add(
        "--size",
        metavar="SIDE|HxW",
        default="512",
        help="image size in pixels, multiples of 32 (default: %(default)s)",
    )
    add("--vocab", "--labels", metavar="WORDS", help="words of the graph (default: those stored in the checkpoint)")
    add("--fixed", action="store_true", help="store the embeddings of the words in the graph")
    add_templates_option(export)
    opset_help = f"ONNX opset version, at least {DEFAULT_OPSET} (default: %(default)s)"
    add("--opset", type=int, default=DEFAULT_OPSET, metavar="N", help=opset_help)
    check_help = "compare the graph with the model on random images (default: if onnxruntime is installed)"
    add("--check", action=argparse.BooleanOptionalAction, help=check_help)


__all__ = [
    "CLIP_TOKENIZER",
    "TASKS",
    "TEXT_FOLDER",
    "add_convert",
    "add_embed",
    "add_export",
    "add_open",
    "add_segment",
    "add_vocab",
]
