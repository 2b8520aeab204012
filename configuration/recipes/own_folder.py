"""Fine-tuning a GKC checkpoint on pictures of your own.

Before:   python -m train.data.from_folder my-tools --out data/my-tools
Command:  python -m train own_folder dataset=data/my-tools
          python -m train own_folder dataset=data/my-tools init_from=my-checkpoint crop_size=512
Hardware: anything; with the shipped gkc-mini less than a second a step on two CPU cores.
Expect:   your classes, and an evaluation with pictures every 100 steps; the score is your data's, so there is none to
          quote. Words that your pictures do not show may suffer: clip=FOLDER distillation_weight=10 holds them.
"""

from configuration.recipe import Recipe

RECIPE = Recipe(
    vocabulary="dataset",
    eval_split="val",
    init_from="hub_card/gkc-mini",
    steps=300,
    batch_size=4,
    crop_size=128,  # of gkc-mini, which looks at pictures with a short side of 96; 512 for a large checkpoint
    scale_range=(0.8, 1.2),
    learning_rate=1e-4,
    max_grad_norm=1.0,
    warmup_share=0.05,
    num_workers=2,
    save_every=100,
    evaluate_every=100,
    log_every=10,
    train_num_points=1024,
    synonym_mode="none",
    distillation_weight=0.0,
)
