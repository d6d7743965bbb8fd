"""Every setting of mae_jax, exactly once: its value, its unit, and where the value comes from.

The values are the paper's pre-training recipe (He et al. 2021, arXiv 2111.06377, Table 8) for ViT-B/16 on ImageNet-1k;
what pre-training does not use is off, or follows its own source. Other configs start from here. Any setting can be
changed on the command line, as in `--config.train.epochs=100`; `None` means "not set". A task refuses settings that it
does not read (mae_jax/settings/checks.py)."""

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference, placeholder

from mae_jax.models.config import SIZES


def get_config() -> ConfigDict:
    config = ConfigDict()
    # pretrain | classify | knn | logistic_regression | few_shot | probe_sweep | features | retrieve | evaluate |
    # predict | reconstruct | export | demo | prepare | inspect | ablate
    config.task = "pretrain"
    config.seed = 0  # of the initial weights, and of masks, mixing and drop path
    # A workdir, one checkpoint step, the authors' .pth, a Hugging Face or timm folder or file, hf://owner/name.
    config.init_from = placeholder(str)
    # A 3-channel model in init_from starts one of N channels: mean | repeat | for each channel its old one or None.
    config.init_channels = placeholder(object)
    config.format = placeholder(str)  # export: huggingface | facebook | timm | stablehlo | onnx
    config.encoder_only = False  # export: leave out the decoder or the head

    config.given = ()  # set by main.py: keys of the settings on the command line
    config.file = placeholder(str)  # set by main.py for the task ablate: its config, FILE or FILE:ARGUMENT

    config.shard = placeholder(str)  # part of an ablation: "i/n" makes every n-th run (i from 0 to n - 1); None: all
    ablate = config.ablate = ConfigDict()  # pre-trains and measures each cell of a grid (docs/ablations.md)
    ablate.grid = ()  # axes: (key, values) or (key, values, names); keys that change together form a tuple
    ablate.seeds = (0,)  # each makes a separate run, as seed and data.seed
    # Protocols for each encoder: (name, config, overrides), as ("a", "finetune", (("train.epochs", 20.0),)).
    ablate.measure = ()
    ablate.scores = ("eval/loss",)  # columns of the table: pre-training's results, and NAME/top1 of the protocols
    ablate.plot = ()  # the scores to draw
    ablate.paper = ()  # the paper's curves, drawn beside them: (name, ((x or a row's name, y), ...))
    ablate.title = ""  # of the picture
    ablate.source = ""  # of the paper's curves

    assume = config.assume = ConfigDict()  # what a file of another program in init_from does not say
    assume.update(num_heads=placeholder(int), decoder_num_heads=placeholder(int), normalize_targets=placeholder(bool))
    assume.update(norm_epsilon=placeholder(float), activation=placeholder(str), image_size=placeholder(object))

    model = config.model = ConfigDict()
    model.image_size = FieldReference(224, field_type=object)  # pixels: one int, or (height, width)
    model.patch_size = 16  # pixels; must divide height and width
    model.channels = 3
    model.width = 768  # of the encoder's tokens (ViT-B; models/config.py lists the named sizes)
    model.depth = 12  # encoder blocks
    model.num_heads = 12
    model.mlp_ratio = 4.0  # hidden width of the MLPs / token width, encoder and decoder
    model.mlp_width = placeholder(int)  # hidden width of the encoder's MLPs; None: mlp_ratio x width
    model.decoder_mlp_width = placeholder(int)
    model.decoder_width = 512
    model.decoder_depth = 8
    model.decoder_num_heads = 16
    model.mask_ratio = 0.75  # share of the patches hidden from the encoder; int(L * (1 - ratio)) stay visible
    model.mask_sampling = "random"  # random | block (arXiv 2106.08254) | grid (of each 2 x 2 one is seen) | module:name
    model.mask_cell = 1  # random: patches are hidden in cells of this side (2, 4: Pixio, arXiv 2512.15715)
    model.encoder_mask_tokens = False  # the encoder also sees the hidden places, as mask tokens (paper, Table 1c)
    model.loss_patches = "hidden"  # patches over which the loss is averaged: hidden | all
    model.normalize_targets = True  # predict each patch's pixels normalised by its own mean and variance
    model.pca_targets = placeholder(int)  # number of principal components to predict (paper: 96); None: pixels
    # pixels | normalized_pixels | principal_components | module:Class; None: as the two settings above say.
    model.target = placeholder(str)
    # Additions since the paper; all are off.
    model.class_tokens = 1  # before the patch tokens; a class feature is the mean of these tokens (arXiv 2512.15715)
    model.registers = 0  # extra tokens that the encoder uses and then drops (arXiv 2309.16588)
    model.qk_norm = False  # LayerNorm of each head's queries and keys (arXiv 2302.05442)
    model.decoder_attention = "self"  # self | cross (mask tokens attend to visible patches only: arXiv 2401.14391)
    model.prediction_ratio = placeholder(float)  # cross: share of all patches predicted in a step; None: all hidden
    model.masks_per_image = 1  # masks of each image in a step (arXiv 2212.07525); its patches are embedded once
    model.uniformity = 0.0  # weight of the regulariser that keeps images apart (U-MAE, arXiv 2210.08344: 0.01)
    model.positions = "sincos"  # sincos (fixed, as in the paper) | learned (starts as sincos; so do all classifiers')
    model.activation = "gelu"  # of the MLPs; gelu is exact (gelu_tanh, relu, ...: models/layers.py lists them)
    model.qkv_bias = True  # whether queries, keys and values have a bias
    model.norm_epsilon = 1e-6  # of every LayerNorm
    # Of products and activations: float32 (jax_default_matmul_precision) | bfloat16; None: bfloat16 if the chip has it.
    model.dtype = placeholder(str)
    # xla | pallas | cudnn (both keep no weights; NVIDIA GPUs, with dtype bfloat16). None: as the chip does it best.
    model.attention = placeholder(str)
    # Recompute the blocks' activations in the backward pass: less memory, more time. None: as the chip does it best.
    model.remat = placeholder(bool)
    # Blocks unrolled in an iteration of the scan over depth. None: as the chip does it best.
    model.scan_unroll = placeholder(int)

    data = config.data = ConfigDict()
    # digits | image_folder | table | parquet | webdataset | prepared | synthetic | a TFDS data set | module:Class.
    # None: what init_from was trained on.
    data.name = FieldReference("imagenet2012", field_type=str)
    # A folder; table: a file (.csv, .tsv, .parquet); parquet: or hf://OWNER/NAME; TFDS: its data_dir (None: its own).
    data.path = placeholder(str)
    data.root = placeholder(str)  # table: the folder of its files; None: the table's own
    # TFDS splits, sub-folders of an image folder, shards' names, values of a column, in any usual spelling ("": none).
    data.train_split = "train"
    data.eval_split = "validation"  # or the test pictures, if there are no others
    data.eval_fraction = 0.1  # data without a split for evaluation: share of pictures held out; 1: all
    data.stratify = True  # hold out this share of each class; False: of all pictures together
    # Columns of table and parquet (webdataset: fields). "": none; None: of the usual names file, label, split, group.
    data.image_column = placeholder(str)
    data.label_column = placeholder(object)  # a name, or several: one column for each label of multi, or each number
    data.split_column = placeholder(str)
    data.group_column = placeholder(str)  # all pictures of a group (a patient, a place) are in one split
    # class (one of several) | multi (any of several) | number (regression). None: class; multi if the data say so.
    data.label_kind = placeholder(str)
    data.label_separator = placeholder(str)  # multi: between the labels in one cell; alone in a cell: none applies
    data.extensions = placeholder(object)  # image_folder: read only these files, as ('.tif',); None: all known ones
    data.num_examples = 1024  # synthetic only: size of the training split; the evaluation split has a quarter of it
    # Images a step, over all devices and parts. None: a power of two from 16 to 256, for at least 16 steps an epoch.
    data.batch_size = FieldReference(4096, field_type=int)
    data.seed = 0  # of the order and of the random crops
    data.crop_scale = (0.2, 1.0)  # random resized crop: area kept, as a share of the picture's
    data.crop_ratio = (3 / 4, 4 / 3)  # random resized crop: width / height of the crop
    # A random box beyond the picture: retry (draw again) | clip (the paper's linear probe). centre: evaluation's crop.
    data.crop_rule = "retry"
    data.flip = True  # mirror half of the training images, left to right
    data.color_jitter = 0.0  # brightness, contrast and saturation are scaled by factors from 1 - this to 1 + this
    data.eval_crop = 0.875  # evaluation: side of the centre crop / shorter side of the resized picture (224 / 256)
    data.label_fraction = placeholder(float)  # share of each class's training pictures used; None: all
    data.augmentation = "none"  # of the cropped training picture: none | rand_augment (arXiv 1909.13719)
    data.rand_augment_ops = 2  # operations a picture, each applied with probability 1/2
    data.rand_augment_magnitude = 9.0  # mean of their strength, on a scale to 10
    data.rand_augment_magnitude_std = 0.5
    data.erasing = 0.0  # classify: probability that a box of the picture becomes noise (arXiv 1708.04896)
    data.mixup = 0.0  # classify: alpha of the Beta distribution of mixup's weights (arXiv 1710.09412); 0: off
    data.cutmix = 0.0  # classify: alpha of cutmix (arXiv 1905.04899); 0: off
    data.mix_probability = 1.0  # share of the pairs of pictures that are mixed
    data.mix_switch_probability = 0.5  # share of the mixed pairs that cutmix takes, if both are on
    data.bands = placeholder(object)  # channels of the pictures that the model sees, in this order, from 0; None: all
    # Of pictures on host and devices: uint8 | uint16 | int16 | float16 | float32; None: that of the first pictures.
    data.dtype = placeholder(str)
    # (low, high): the values of black and white, 0 and 1 for mean and std; others are clipped. None: 0 and 255 of 8-bit
    # pictures; the values of others are taken as they are.
    data.value_range = placeholder(object)
    # A file with value_range, mean and std: statistics.json of the task inspect, or a prepared folder.
    data.statistics = placeholder(str)
    data.mean = (0.485, 0.456, 0.406)  # ImageNet's, of each channel on [0, 1]; one value serves all channels
    data.std = (0.229, 0.224, 0.225)
    data.num_threads = 16  # reader threads at most; never more than cores (in a worker process: than its share)
    data.num_workers = 0  # reader processes; 0: threads of the main process read
    data.prefetch_batches = 2  # batches kept ready on the device, and as many more on the host
    # Pictures stay on the devices and are cropped there. None: if all have one size of at most 128.
    data.on_device = placeholder(bool)
    data.on_bad_image = "replace"  # replace: use another, count it, fail above 1 %; raise: stop at the first
    data.max_pixels = 178_956_970  # width x height above which a picture is refused; at most this, Pillow's own limit

    classifier = config.classifier = ConfigDict()  # what the task classify adds to the encoder
    classifier.num_classes = placeholder(int)  # None: the data's
    classifier.random_encoder = False  # random weights, in an encoder of the size of the one in init_from
    # What the head sees: mean_norm (the norm of the patch tokens' mean) | mean (of the normed patch tokens) |
    # class (the normed class token) | attentive (a learned query attends to the normed patch tokens) | abmilp (a small
    # network weights the normed patch tokens: arXiv 2412.03215).
    classifier.pool = "mean_norm"
    # Last blocks that train, with norm and head: 0 (the head), 0.5 (the last block's MLP), 1, ...; None: everything.
    classifier.trained_blocks = placeholder(float)
    classifier.batch_norm = False  # BatchNorm without scale and bias before the linear layer (linear probe)
    classifier.head_std = 2e-5  # standard deviation of the linear layer's initial kernel
    classifier.drop_path = 0.0  # probability of dropping a residual branch: rises from 0 to this over the blocks
    classifier.class_weights = placeholder(str)  # of the classes in the loss: balanced; None: all alike
    classifier.label_smoothing = 0.0  # share of the target that is spread evenly over all classes

    train = config.train = ConfigDict()
    train.epochs = 800.0  # of floor(examples / batch size) steps each
    train.steps = placeholder(int)  # if set, replaces the epochs
    # Smaller images first (arXiv 2212.06593): (share of the run at which a stage ends, its size), as ((0.5, 128),).
    train.resolutions = ()
    train.log_every_steps = 50
    train.skip_nonfinite = 0  # non-finite updates that may be skipped before the run stops
    train.profile_steps = 0  # steps to profile, into profile/ (for TensorBoard or Perfetto); 0: none
    train.accumulate_steps = 1  # parts that a batch is split into, to save memory; the update is the whole batch's
    train.ema_decay = placeholder(float)  # if set, a moving average of the weights is kept, evaluated and exported

    optimizer = config.optimizer = ConfigDict()
    # adamw | lars (probes) | muon (arXiv 2502.16982: for the blocks' matrices, at adamw's rate).
    optimizer.name = "adamw"
    optimizer.base_learning_rate = 1.5e-4  # at batch 256: the peak rate is this x batch_size / 256
    optimizer.warmup_epochs = 40.0  # linear from 0; in a run that is no longer than this, a tenth of it
    # After the warm-up: cosine | constant | warmup_stable_decay (arXiv 2405.18392) | module:function.
    optimizer.schedule = "cosine"
    optimizer.decay_fraction = 0.2  # warmup_stable_decay: share of the steps after the warm-up in which the rate falls
    optimizer.min_learning_rate = 0.0  # at the end
    optimizer.update(b1=0.9, b2=0.95, epsilon=1e-8)
    optimizer.weight_decay = 0.05  # on kernels; pre-training: also class and mask tokens, registers; no biases, norms
    optimizer.layer_decay = 1.0  # an encoder block's rate / that of the block after it (arXiv 2106.08254)
    optimizer.muon_momentum = 0.95  # muon: Nesterov's
    optimizer.momentum = 0.9  # lars
    optimizer.trust_coefficient = 0.001  # lars: an update's norm / its weights' norm, at rate 1
    optimizer.clip_norm = placeholder(float)  # largest global norm of the gradient; None: no clipping (as in the paper)

    checkpoint = config.checkpoint = ConfigDict()
    checkpoint.every_steps = 1000  # and always at the end
    checkpoint.keep = 3  # newest checkpoints kept
    checkpoint.keep_every_steps = placeholder(int)  # checkpoints at multiples of this are never deleted

    config.logging = ConfigDict()  # where numbers and pictures go
    config.logging.writers = ("jsonl", "tensorboard")  # jsonl (always) | tensorboard | wandb | mlflow | module:Class

    evaluate = config.evaluate = ConfigDict()
    evaluate.every_steps = placeholder(int)  # None: at the end only
    # loss | reconstructions | knn | linear_probe | few_shot | rankme | accuracy | module:class; (): the objective's.
    evaluate.evaluators = ()
    evaluate.mask_ratio = placeholder(float)  # for the evaluation's losses and pictures; None: the model's
    # Your own masks (README): FILE.npy, [pictures, rows, columns], or FILE.py:FUNCTION; None: masks are drawn.
    evaluate.mask = placeholder(str)
    evaluate.batch_size = 256  # images at most, over all devices
    # Features, after the final norm: mean (of the patch tokens) | class (the class token) | patches (task features).
    evaluate.token = "mean"
    evaluate.layer = placeholder(int)  # the block whose tokens are taken, from 1 to the last, -1; None: the last
    # Training images (a fixed random subset) for k-NN and the probe while pre-training; None: all.
    evaluate.max_train_examples = FieldReference(50_000, field_type=int)
    evaluate.max_examples = placeholder(int)  # evaluation images used (a fixed random subset); None: all
    evaluate.knn_k = 20
    evaluate.knn_temperature = 0.07  # weight of a neighbour: exp(cosine / temperature)
    evaluate.knn_sweep_k = (1, 5, 10, 20, 50, 100, 200)  # the task knn measures every pair of these
    evaluate.knn_sweep_temperature = (0.03, 0.07, 0.2)
    evaluate.random_encoder = True  # also measure random weights, at the end and in the tasks that measure
    evaluate.linear_probe = True  # during and after pre-training: a logistic regression on the frozen features
    evaluate.probe_c = 1.0  # inverse strength of the logistic regression's L2 penalty
    evaluate.probe_sweep_c = (0.01, 0.1, 1.0, 10.0)  # the task logistic_regression measures all of these
    evaluate.shots = (5, 10)  # few_shot: training images of each class
    evaluate.shot_draws = 5  # few_shot: random choices of these images, over which is averaged
    # few_shot: L2 penalties (scikit-learn's alpha) to choose from by leave-one-out; big_vision has 1024.
    evaluate.shot_penalties = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0)
    # probe_sweep: groups of blocks, from 1 to the last, -1; those of a group are concatenated, as ((6,), (-2, -1)).
    evaluate.layers = placeholder(object)  # None: the last block, and the last four
    evaluate.probe_sweep_rates = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)  # of SGD, at batch 256
    evaluate.probe_sweep_epochs = 100.0
    evaluate.probe_sweep_batch_size = 256  # features, over all devices
    evaluate.probe_sweep_held_out = 0.1  # share of each class's training images that choose the best probe
    evaluate.pictures = 8  # reconstructions to draw
    # Channels drawn as red, green and blue, or one as grey, of other than 1 or 3; None: the first three.
    evaluate.shown_channels = placeholder(object)

    features = config.features = ConfigDict()  # the task features
    features.format = "parquet"  # parquet: one table | npy: arrays of features and labels
    features.image_sizes = ()  # one file for each of these sizes, as (160, 224); (): the model's

    config.reconstruct = ConfigDict()  # the task reconstruct
    config.reconstruct.masks = 8  # masks of each picture, over which its error is averaged
    config.reconstruct.outliers = ()  # classes that the errors are to tell from the others, as ('odd',)

    config.predict = ConfigDict()  # the task predict
    config.predict.top = 5  # classes listed for each picture, where one of several applies
    config.predict.pictures = 40  # at most, on the sheet of wrong and unsure ones

    retrieve = config.retrieve = ConfigDict()  # the task retrieve
    # Where neighbours are searched, and of what: a picture, a folder of pictures, or features.parquet (or a folder with
    # one). None: the data's training pictures, and its evaluation pictures.
    retrieve.index = placeholder(str)
    retrieve.queries = placeholder(str)
    retrieve.k = 10  # neighbours of each query
    retrieve.pictures = 100  # queries on the page to look through; 0: no page

    prepare = config.prepare = ConfigDict()  # the task prepare: data as shards that are read quickly, in the workdir
    prepare.short_side = placeholder(int)  # pixels of the shorter side at most; None: pictures stay as they are
    prepare.quality = 95  # of the JPEGs that are written then
    prepare.shard_examples = 4096  # pictures in a shard

    config.inspect = ConfigDict()  # the task inspect
    config.inspect.max_examples = placeholder(int)  # training pictures measured (a fixed random subset); None: all
    config.inspect.crops = 64  # training crops drawn

    demo = config.demo = ConfigDict()  # the task demo: a page to look at, served to this machine only
    demo.port = 7860  # of http://127.0.0.1; 0: a free one
    demo.open = False  # open the page in a browser
    demo.index = placeholder(str)  # a folder with features.parquet of the same encoder: also shows nearest neighbours

    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # devices along each axis; -1: all that remain
    config.mesh.cpu_devices = 1  # devices that a process makes of its CPU's cores
    return config.lock()  # a config that sets an unknown key is refused


def vit(size: str, **model) -> ConfigDict:
    """The defaults with an encoder of a named size (mae_jax/models/config.py) and other settings of the model."""
    config = get_config()
    config.model.update(SIZES[size], **model)
    return config


def of_checkpoint(task: str) -> ConfigDict:
    """The defaults for a task that measures or exports a checkpoint, on the checkpoint's own data."""
    config = get_config()
    config.task = task
    config.data.name = None
    return config
