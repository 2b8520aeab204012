"""Mini-world: the paper's main ablation on drawn images, in minutes.

Command:  python -m train.miniworld
Hardware: two CPU cores, about three quarters of a second per step.
Expect:   the results in the model card of gkc-mini; names of color and fill are recognized only with distillation.
"""

from configuration.recipe import Recipe
from configuration.sections import (
    DataSection,
    DistillationSection,
    MatchingSection,
    ModelSection,
    OptimizerSection,
    SynonymsSection,
)

RECIPE = Recipe(
    data=DataSection(batch_size=12, crop_size=None),
    model=ModelSection(
        config={
            "hidden_size": 96,
            "mask_feature_size": 96,
            "encoder_layers": 2,
            "encoder_ffn_dim": 192,
            "decoder_layers": 3,
            "decoder_ffn_dim": 192,
            "num_attention_heads": 4,
            "num_queries": 20,
            "class_feature": "query+pooled",
        }
    ),
    optimizer=OptimizerSection(
        steps=400,
        learning_rate=1e-3,
        backbone_factor=0.3,
        weight_decay=0.05,
        max_grad_norm=1.0,
        warmup_share=0.05,
    ),
    matching=MatchingSection(train_num_points=576),  # as many as a mask of 24 x 24 has pixels
    synonyms=SynonymsSection(
        weight=2.0,
        probabilities="teacher",
        logit_scale=11.0,  # at which the tiny CLIP's temperature is capped
    ),
    distillation=DistillationSection(embedding="shared", terms="split"),
)
