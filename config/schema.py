"""The configuration schema: every key, its default and its meaning.

A YAML file states differences only; `BASE:` names one file or a list of files (relative to it) that are merged before it,
later ones winning. A `PUBLISHED:` section states what differs in the authors' own runs: with RECIPE.MODE published it is
merged right after its file, otherwise left out (`PUBLISHED: null` states that no run was published, `{}` that nothing differs).
`--opts KEY VALUE ...` is merged last (config/merge.py), then the values are checked (config/validate.py). The result is
frozen: derived values (accumulation, scaled learning rate) are computed in engine/ and never written back, so that the dump
of a config loads to the same config.
"""

from yacs.config import CfgNode

_C = CfgNode()

# One YAML file or a list of them to start from, relative to the file that names them; empty in a resolved config.
_C.BASE = [""]

# Folder of the run directories, which are OUTPUT/NAME, or OUTPUT/NAME-TAG.
_C.OUTPUT = "output"
# Name of the run; "" means <MODEL.NAME>_<DATA.IMG_SIZE>.
_C.NAME = ""
# Distinguishes runs of one config.
_C.TAG = ""
# auto (CUDA when there is one), cpu or cuda.
_C.DEVICE = "auto"

_C.RECIPE = CfgNode()
# corrected, or published: what the authors' trainers executed, quirks included (docs/recipes.md lists the differences).
_C.RECIPE.MODE = "corrected"
# The weights whose accuracy is the recipe's result, raw or ema. Both are evaluated and kept all the same.
_C.RECIPE.HEADLINE = "raw"
# Differences of the authors' runs, in YAML files; empty in a resolved config.
_C.PUBLISHED = CfgNode()

_C.MODEL = CfgNode()
# Any registered name of models/ (groupmixformer_mobile, ...), of timm or of MODULE.
_C.MODEL.NAME = "groupmixformer_mobile"
# A file (mine/net.py) or module (package.net) to import first, which registers custom models: docs/extending.md.
_C.MODEL.MODULE = ""
# 0 takes the number from the data; any other number must equal it.
_C.MODEL.NUM_CLASSES = 0
# Dropout before the classifier.
_C.MODEL.DROP_RATE = 0.0
# Stochastic depth of the last block; the blocks before it rise linearly from 0.
_C.MODEL.DROP_PATH_RATE = 0.0
# Weights to start from (.safetensors, or a checkpoint of a run); "" starts from random weights.
_C.MODEL.INIT = ""
# Weights of MODEL.INIT to take, raw or ema; "" takes those it holds, RECIPE.HEADLINE's if both.
_C.MODEL.INIT_WEIGHTS = ""
# BatchNorm statistics over all processes (torch.nn.SyncBatchNorm, CUDA only) instead of over each micro-batch.
_C.MODEL.SYNC_BN = False
# triton: the Triton kernel of the MLPs of SG-Former and STViT, CUDA only, in place of PyTorch's operations; or off. It computes
# the same to round-off and has not been run on a GPU: benchmarks/kernels.py measures it. auto is triton where it moves fewer
# bytes: on CUDA, in these families, with Triton and compute capability 8.0 or later.
_C.MODEL.KERNELS = "auto"
# Implementation of LayerNorm: torch, or apex (NVIDIA's FusedLayerNorm, in float32 as well).
_C.MODEL.NORM_BACKEND = "torch"

_C.DATA = CfgNode()
# Folder with train/<class>/*.jpg and val/<class>/*.jpg, or with the archives that hold them: docs/data.md.
_C.DATA.PATH = ""
# File with the classes of validation images without class folders; "" searches beside them and in DATA.PATH.
_C.DATA.VAL_LABELS = ""
# torch (decodes JPEGs on the CPU), dali (NVIDIA DALI, on a GPU or the CPU) or synthetic (random images, no decoding: the
# ceiling of everything else).
_C.DATA.LOADER = "torch"
# Device on which DALI decodes: cpu, gpu, or auto, the device of the model.
_C.DATA.DALI_DEVICE = "auto"
# Training and evaluation crop, pixels.
_C.DATA.IMG_SIZE = 224
# File that fixes the order of the classes; "" sorts the folder names.
_C.DATA.CLASS_INDEX = ""
# Loader processes of each training process; -1 chooses by the number of cores.
_C.DATA.WORKERS = -1
# Batches each worker keeps ready.
_C.DATA.PREFETCH = 4
# Shuffle blocks of this many neighbouring images, then inside windows of 256 blocks (networked storage); 0 shuffles all.
_C.DATA.BLOCK_SHUFFLE = 0
# Share of the training images that may be unreadable, rounded up to whole images; 0 stops at the first.
_C.DATA.MAX_BAD_SHARE = 0.001
# Evaluation with EVAL.MODE center: the shorter side is resized to this, then cropped; 0 resizes the whole image to the
# crop. EVAL.CROP_PCT, if set, comes before it.
_C.DATA.EVAL_RESIZE = 256
# Resampling for training crops (bicubic, bilinear, random of the two) ...
_C.DATA.INTERPOLATION = "bicubic"
# ... and for evaluation.
_C.DATA.EVAL_INTERPOLATION = "bicubic"
# Per-channel mean and standard deviation of the normalisation, of pixels in 0..1.
_C.DATA.MEAN = [0.485, 0.456, 0.406]
_C.DATA.STD = [0.229, 0.224, 0.225]
# Sizes of the synthetic data set.
_C.DATA.SYNTHETIC_TRAIN = 12800
_C.DATA.SYNTHETIC_VAL = 1000
# Classes of the synthetic data set.
_C.DATA.SYNTHETIC_CLASSES = 1000

_C.AUG = CfgNode()
# Area of the random crop, as a share of the image, and its aspect ratio.
_C.AUG.SCALE = [0.08, 1.0]
_C.AUG.RATIO = [0.75, 1.3333333333333333]
# Probability of a horizontal flip.
_C.AUG.HFLIP = 0.5
# timm's policy string; "" is off.
_C.AUG.RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
# Random erasing: probability, fill (pixel: noise, rand: one colour, const: mean), boxes, area as a share of the crop.
_C.AUG.ERASE_PROB = 0.25
_C.AUG.ERASE_MODE = "pixel"
_C.AUG.ERASE_COUNT = 1
_C.AUG.ERASE_AREA = [0.02, 0.3333333333333333]
# Beta parameters of mixup and cutmix, 0 is off.
_C.AUG.MIXUP = 0.8
_C.AUG.CUTMIX = 1.0
# Probability that a micro-batch is mixed at all, and that cutmix is taken when both are on.
_C.AUG.MIX_PROB = 1.0
_C.AUG.MIX_SWITCH_PROB = 0.5
# erase_then_mix, or mix_then_erase (SG-Former).
_C.AUG.ORDER = "erase_then_mix"
# Label smoothing of the training targets.
_C.AUG.LABEL_SMOOTHING = 0.1
# Repeated augmentation: samples of each image in an epoch (DeiT: 3; the epoch keeps its length).
_C.AUG.REPEATS = 1

_C.TRAIN = CfgNode()
# Passes over the training images.
_C.TRAIN.EPOCHS = 300
# Images of an update, on all processes together ...
_C.TRAIN.GLOBAL_BATCH = 1024
# ... in pieces of this many images; GLOBAL_BATCH = MICRO_BATCH x processes x accumulation, which follows.
_C.TRAIN.MICRO_BATCH = 128
# Seed of everything random: order, augmentation, mixing, drop path, initial weights.
_C.TRAIN.SEED = 0
# Train with the model in evaluation mode, as DeiT and STViT fine-tune: no dropout, no drop path, frozen BatchNorm statistics.
_C.TRAIN.EVAL_MODE = False
# Largest L2 norm of the gradient; 0 is off.
_C.TRAIN.CLIP_GRAD = 0.0
# An update whose loss or gradient is not finite is skipped. After this many consecutive skips the run goes back to its last good
# checkpoint, once; the next time it stops.
_C.TRAIN.MAX_SKIPPED = 10
# Numbers of the forward pass: bf16, fp16 (with loss scaling) or off (float32).
_C.TRAIN.AMP = "bf16"
# torch.compile of the model, in training and evaluation: off, default, max-autotune (tries kernels, takes longer to compile)
# or reduce-overhead (default with CUDA graphs; CUDA only, without accumulation and EVAL.FLIP). auto is default for Retoken's
# families on CUDA, else off.
_C.TRAIN.COMPILE = "auto"
# The first blocks of the model that run again in the backward pass instead of keeping activations (less memory, more time);
# -1 is all of them, the only number besides 0 for timm's models.
_C.TRAIN.CHECKPOINT_BLOCKS = 0
# cuDNN may try algorithms and take the fastest; false asks it for deterministic ones.
_C.TRAIN.BENCHMARK = True

_C.OPTIM = CfgNode()
# Name in timm's optimiser factory ("sgd" is Nesterov's, "momentum" the plain one).
_C.OPTIM.NAME = "adamw"
# Implementation: fused (one kernel), foreach (few), for-loop (several a weight), apex (NVIDIA's adamw, adam, lamb), or auto:
# fused where torch has it, else the optimiser's own choice.
_C.OPTIM.BACKEND = "auto"
# Peak learning rate, for a global batch of SCALE_BATCH; 0 there takes LR as it is.
_C.OPTIM.LR = 1e-3
_C.OPTIM.SCALE_BATCH = 0
# Of the optimisers that have them; [] and 0 leave them at the optimiser's own.
_C.OPTIM.BETAS = []
_C.OPTIM.EPS = 0.0
_C.OPTIM.MOMENTUM = 0.9
# Not applied to biases, other one-dimensional parameters and what the model names in no_weight_decay().
_C.OPTIM.WEIGHT_DECAY = 0.05
# Learning rate of each layer (stem, every block) relative to the one after it; 1 is off, 0.75 usual for fine-tuning.
_C.OPTIM.LAYER_DECAY = 1.0

_C.SCHEDULE = CfgNode()
# How the learning rate falls after the warmup, in timm's formulas: cosine, tanh or poly to MIN_LR, step, multistep or constant.
_C.SCHEDULE.NAME = "cosine"
# Unit in which it changes: every update, or every epoch only.
_C.SCHEDULE.UNIT = "update"
# Steps (in UNIT, updates or epochs) that it lags behind: 1 takes the first value twice, as two of the authors' trainers do.
_C.SCHEDULE.DELAY = 0
# Linear warmup, in epochs, from WARMUP_LR; it replaces the schedule's first epochs and does not lengthen it.
_C.SCHEDULE.WARMUP_EPOCHS = 20.0
_C.SCHEDULE.WARMUP_LR = 1e-6
# Learning rate at which cosine, tanh and poly end after TRAIN.EPOCHS.
_C.SCHEDULE.MIN_LR = 1e-5
# Epochs after TRAIN.EPOCHS, at the learning rate that those end with.
_C.SCHEDULE.COOLDOWN_EPOCHS = 0
# WARMUP_LR and MIN_LR are scaled with the global batch as OPTIM.LR is.
_C.SCHEDULE.SCALED = False
# step: epochs between two falls; multistep: the epochs of the falls; both: what the rate is multiplied by.
_C.SCHEDULE.DECAY_EPOCHS = 30.0
_C.SCHEDULE.MILESTONES = []
_C.SCHEDULE.DECAY_RATE = 0.1
# poly: the exponent.
_C.SCHEDULE.POWER = 1.0

# Values that change from epoch to epoch: "" leaves the key that is named; else EPOCH:VALUE points, "0:0.4, 260:0.6" (steps) or
# "0:0.1 -> 100:0.4" (linear).
_C.TIMELINE = CfgNode()
# In place of MODEL.DROP_PATH_RATE.
_C.TIMELINE.DROP_PATH_RATE = ""
# In place of EMA.DECAY, which must be on.
_C.TIMELINE.EMA_DECAY = ""
# Magnitude of AUG.RAND_AUGMENT, in place of its m.
_C.TIMELINE.MAGNITUDE = ""
# In place of AUG.MIX_PROB; "0:1, 280:0" turns mixing off at epoch 280.
_C.TIMELINE.MIX_PROB = ""
# Size of the training images, in place of DATA.IMG_SIZE, which stays the size of evaluation; ramps go in multiples of 32.
_C.TIMELINE.IMG_SIZE = ""

_C.DISTILL = CfgNode()
# DeiT's distillation: soft (the teacher's distribution), hard (its most probable class), or none.
_C.DISTILL.TYPE = "none"
# Teacher model: any registered name of models/ or of timm, for the classes of the data.
_C.DISTILL.TEACHER = ""
# Its weights: a file of any layout that MODEL.INIT takes, or pretrained for those that timm downloads.
_C.DISTILL.TEACHER_WEIGHTS = ""
# Share of the distillation loss; the rest is the loss on the targets.
_C.DISTILL.ALPHA = 0.5
# Temperature that soft divides both models' logits by.
_C.DISTILL.TAU = 1.0

_C.EMA = CfgNode()
# Decay per update of the averaged weights, which are evaluated and kept beside the raw ones; 0 is off.
_C.EMA.DECAY = 0.0

_C.EVAL = CfgNode()
# Images per forward pass and process.
_C.EVAL.BATCH = 128
# Evaluate every so many epochs (the last one always).
_C.EVAL.EVERY = 1
# How an image becomes the DATA.IMG_SIZE square, by timm's names: center (shorter side resized, centre cropped), squash
# (squeezed to a square) or border (longer side resized, the rest filled with DATA.MEAN). squash and border show the whole
# image unless CROP_PCT is below 1.
_C.EVAL.MODE = "center"
# The crop as a share of the resized side: that is floor(IMG_SIZE / CROP_PCT) pixels. 0 leaves it to DATA.EVAL_RESIZE with
# center, and is 1 with squash and border.
_C.EVAL.CROP_PCT = 0.0
# Average the logits of the image and of its mirror image; takes twice as long.
_C.EVAL.FLIP = False

_C.CHECKPOINT = CfgNode()
# Also save in the middle of an epoch, every so many updates; 0 saves at the end of an epoch only.
_C.CHECKPOINT.EVERY_UPDATES = 0
# Checkpoints kept besides the best weights.
_C.CHECKPOINT.KEEP = 2
# Consecutive failures to write one (disk full, no permission) after which the run stops; before, it trains on.
_C.CHECKPOINT.MAX_FAILURES = 3

_C.DIST = CfgNode()
# Seconds within which all processes of a run must have started.
_C.DIST.START_TIMEOUT = 300.0
# Seconds after which an exchange between processes fails: a process has ended, or is elsewhere in the program.
_C.DIST.TIMEOUT = 1800.0
# Gradients are reduced in buckets of this many MiB, each as soon as it is complete.
_C.DIST.BUCKET_MB = 25.0
# Compression of the gradients that are exchanged: none, bf16 or fp16 (half the bytes, rounded gradients).
_C.DIST.COMPRESS = "none"
# Promise DistributedDataParallel that every update uses the same weights in the same order, so that it searches for no unused ones.
_C.DIST.STATIC_GRAPH = False

_C.LOG = CfgNode()
# A line and a metrics.jsonl row every so many updates.
_C.LOG.EVERY = 50
# Write TensorBoard events into the run directory.
_C.LOG.TENSORBOARD = True
# Project of Weights & Biases that the run is shown in (pip install wandb); "" is off.
_C.LOG.WANDB = ""
# Sample images: the first batch, and every so many epochs the attention maps of a few validation images, for models that have
# them (at the evaluation that is due then or next, and at the last); 0 draws nothing.
_C.LOG.PICTURES_EVERY = 10


def defaults() -> CfgNode:
    """Return a fresh, mutable copy of the schema with its defaults."""
    return _C.clone()
