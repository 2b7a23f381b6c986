"""Trains a small convolutional network on the MNIST digits, with what gets the last tenths of it.

    python recipes/mnist_cnn.py              10 epochs, then the test accuracy
    python recipes/mnist_cnn.py --plot curves.png    (needs matplotlib)

Three blocks of convolution, BatchNorm, ReLU and pooling, then Dropout and a linear layer. Training
images are turned by up to 10 degrees and moved by up to 2 pixels, another way each time, on the
device. Adam warms up for a tenth of the steps and goes down along a cosine. Evaluated is a moving
average of the weights; 5,000 training digits are kept to see when it gets no better, which ends
the training. It takes 6 minutes on 2 CPU cores. Test accuracy with seeds 0, 1, 2: 0.9951, 0.9946,
0.9936. Seed 0 prints, at the end:

    stopped by max_epochs after 10 epochs
    test accuracy: 0.9951

Shapes: B batch, H height, W width, C channels or classes.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from command_line import make_parser
from jaxtrainer import Trainer, TrainModule, data
from jaxtrainer.callbacks import EMA, Accuracy, EarlyStopping, Timer
from mnist_data import NUM_CLASSES, load_mnist, to_float_maps

NUM_VALIDATION = 5000
MAX_TURN = jnp.pi / 18  # 10 degrees
MAX_SHIFT = 2.0  # pixels


class ConvNet(nnx.Module):
    def __init__(self, channels, dropout, rngs):
        sizes = zip((1, *channels), channels, strict=False)
        self.convs = nnx.List(
            nnx.Conv(*pair, kernel_size=(3, 3), use_bias=False, rngs=rngs) for pair in sizes
        )
        self.norms = nnx.List(nnx.BatchNorm(size, rngs=rngs) for size in channels)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(3 * 3 * channels[-1], NUM_CLASSES, rngs=rngs)

    def __call__(self, x_BHWC):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            # Pooled at once: BatchNorm costs as much as the convolution on all the pixels.
            x_BHWC = nnx.relu(norm(nnx.max_pool(conv(x_BHWC), (2, 2), strides=(2, 2))))
        return self.head(self.dropout(x_BHWC.reshape(len(x_BHWC), -1)))


def move(image_HW, angle, shift):
    """Turn an image about its centre and shift it, with linear interpolation between pixels."""
    middle = (image_HW.shape[0] - 1) / 2
    row_H1 = jnp.arange(image_HW.shape[0], dtype=jnp.float32)[:, None] - middle
    col_1W = row_H1.T
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    row_HW = cos * row_H1 - sin * col_1W + middle + shift[0]
    col_HW = sin * row_H1 + cos * col_1W + middle + shift[1]
    return jax.scipy.ndimage.map_coordinates(image_HW, [row_HW, col_HW], order=1)


def augment(key, x_BHWC):
    turn_key, shift_key = jax.random.split(key)
    size = len(x_BHWC)
    angle_B = jax.random.uniform(turn_key, (size,), minval=-MAX_TURN, maxval=MAX_TURN)
    shift_B2 = jax.random.uniform(shift_key, (size, 2), minval=-MAX_SHIFT, maxval=MAX_SHIFT)
    return jax.vmap(move)(x_BHWC[..., 0], angle_B, shift_B2)[..., None]


class MnistCNN(TrainModule):
    def __init__(self, channels=(16, 32, 64), dropout=0.3, learning_rate=4e-3):
        self.channels = channels
        self.dropout = dropout
        self.learning_rate = learning_rate

    def configure_model(self, rngs):
        return ConvNet(self.channels, self.dropout, rngs)

    def configure_optimizers(self):
        steps = self.run.estimated_steps
        rate = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, steps // 10, steps)
        return optax.adam(rate)

    def training_step(self, model, batch):
        image_BHWC = augment(self.make_rng(), batch["image"])
        return self.validation_step(model, {**batch, "image": image_BHWC})

    def validation_step(self, model, batch):
        logits_BC = model(batch["image"])
        losses_B = optax.softmax_cross_entropy_with_integer_labels(logits_BC, batch["label"])
        return {"loss": losses_B.mean(), "logits": logits_BC}


def make_loaders(batch_size, seed):
    train_set, test_set = load_mnist()
    kept, held_out = (
        {name: array[rows] for name, array in train_set.items()}
        for rows in (slice(NUM_VALIDATION, None), slice(NUM_VALIDATION))
    )
    load = partial(data.from_arrays, device_transform=to_float_maps)
    return (
        load(kept, batch_size=batch_size, shuffle=True, seed=seed, drop_remainder=True),
        load(held_out, batch_size=500),
        load(test_set, batch_size=500),
    )


def main(argv=None):
    parser = make_parser(__doc__, epochs=10, batch_size=128, seed=0)
    parser.add_argument("--plot", metavar="FILE", help="draw the curves: a name in .png or .svg")
    args = parser.parse_args(argv)
    train_loader, val_loader, test_loader = make_loaders(args.batch_size, args.seed)
    module = MnistCNN()
    trainer = Trainer(
        max_epochs=args.epochs,
        seed=args.seed,
        callbacks=[Timer(), Accuracy(), EMA(0.99), EarlyStopping("val/loss", patience=3)],
    )
    result = trainer.fit(module, train_loader, val_loader)
    accuracy = trainer.test(module, test_loader, verbose=False)["test/accuracy"]
    print(f"stopped by {result.stop_reason} after {result.num_epochs} epochs")
    print(f"test accuracy: {accuracy:.4f}")
    if args.plot:
        result.plot(args.plot)
    return accuracy


if __name__ == "__main__":
    main()
