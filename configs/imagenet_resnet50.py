"""ImageNet, ResNet-50 (4.1 G MACs at 224x224) at half of its MACs.

command:  python -m kdsearch_jax.search --config imagenet_resnet50 --teacher-from resnet50.safetensors
hardware: a TPU v4-8 or eight GPUs, and about 10 CPU cores per 4,000 images a second
time:     not yet run
result:   not yet run

The teacher may be any ResNet-50 in torchvision's parameter names. The images are streamed from TFDS's `imagenet2012`,
prepared once with file_format="array_record" (docs/training.md, "Data that do not fit"); set --data.workers to the
number of spare CPU cores. The test split is TFDS's validation split, whose labels are public.
"""

from kdsearch_jax.runs.config import (
    BudgetConfig,
    DataConfig,
    DistillConfig,
    Experiment,
    ModelConfig,
    RunConfig,
    StageConfig,
    shorten,
)

EPOCH = 1_268_355 // 1024  # updates; a hundredth of the training images is held out


def experiment(quick: bool = False) -> Experiment:
    """Full schedule: 10 epochs of search, 100 of retraining; the quick variant is a narrow ResNet-18 at 32x32."""
    config = Experiment(
        name="imagenet_resnet50",
        model=ModelConfig("resnet", {"depth": 50}),
        data=DataConfig(
            "imagenet2012",
            validation=0.01,
            image_size=32 if quick else 224,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            crop=4 if quick else 0,
            flip=True,
            framing="stretch" if quick else "crop",
            workers=0 if quick else 16,
        ),
        teacher=StageConfig(steps=90 * EPOCH, batch_size=1024, learning_rate=0.4, weight_decay=1e-4, warmup=5 * EPOCH),
        search=StageConfig(
            steps=10 * EPOCH, batch_size=1024, learning_rate=0.02, weight_decay=1e-4, schedule="constant"
        ),
        retrain=StageConfig(steps=100 * EPOCH, batch_size=1024, learning_rate=0.4, weight_decay=1e-4, warmup=5 * EPOCH),
        distill=DistillConfig(temperature=2.0, cross_entropy=0.1),
        budget=BudgetConfig(macs=0.5),
        baselines=("uniform",),
        run=RunConfig(
            precision="bf16", steps_per_dispatch=10, checkpoint_every=EPOCH, evaluate_every=EPOCH, eval_batch_size=1024
        ),
    )
    return shorten(config, depth=18, stem="small", width=16) if quick else config
