"""Train a student on images that a teacher labels with your words; the student needs no CLIP at inference.

Before:   gkc open SEGMENTER --with TOWER --out any-words, or any other GKC checkpoint as the teacher
Command:  python -m train distil PHOTOS --teacher any-words --words "dog; sofa, couch; lamp"
Hardware: one GPU. Not run on photographs here; the duration is unknown.
Expect:   the command prints the agreement of the student with the teacher before and after training, and the seconds
          per image of both. The student cannot be better than its teacher's labels by much.
"""

from configuration.recipe import Recipe
from configuration.sections import (
    DataSection,
    DistillationSection,
    ModelSection,
    OptimizerSection,
    RunSection,
    SynonymsSection,
    TeacherSection,
)

RECIPE = Recipe(
    data=DataSection(
        vocabulary="dataset", eval_split="val", batch_size=8, crop_size=512, num_workers=4, ignore_void=True
    ),
    model=ModelSection(backbone="microsoft/resnet-50"),
    optimizer=OptimizerSection(steps=10_000, learning_rate=1e-4, warmup_share=0.02),
    run=RunSection(save_every=500, evaluate_every=1000),
    teacher=TeacherSection(source="labels"),
    synonyms=SynonymsSection(mode="sample", weight=2.0),
    distillation=DistillationSection(weight=10.0, embedding="shared"),
)
