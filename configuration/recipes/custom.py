"""Fine-tune a GKC checkpoint on your own images.

Before:   python -m train.data.from_folder my-tools --out data/my-tools
Command:  python -m train custom data.dataset=data/my-tools
          python -m train custom data.dataset=data/my-tools model.init_from=my-checkpoint data.crop_size=512
Hardware: any; with the shipped gkc-mini a step takes less than a second on two CPU cores.
Expect:   segmentation of your classes, with an evaluation and pictures every 100 steps. The score depends on your
          data. Classes that your images do not show may be forgotten: model.clip=FOLDER distillation.weight=10
          counteracts that.
"""

from configuration.recipe import Recipe
from configuration.sections import (
    DataSection,
    DistillationSection,
    MatchingSection,
    ModelSection,
    OptimizerSection,
    RunSection,
    SynonymsSection,
)

RECIPE = Recipe(
    data=DataSection(
        vocabulary="dataset",
        eval_split="val",
        batch_size=4,
        crop_size=128,  # for gkc-mini, whose images have a short side of 96; 512 for a large checkpoint
        scale_range=(0.8, 1.2),
        num_workers=2,
    ),
    model=ModelSection(init_from="hub_card/gkc-mini"),
    optimizer=OptimizerSection(steps=300, learning_rate=1e-4, max_grad_norm=1.0, warmup_share=0.05),
    run=RunSection(save_every=100, evaluate_every=100, log_every=10),
    matching=MatchingSection(train_num_points=1024),
    synonyms=SynonymsSection(mode="none"),
    distillation=DistillationSection(weight=0.0),
)
