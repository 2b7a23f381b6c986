"""Trains a small network on the MNIST digits, tests it, and reads digits with it.

    make mnist                               5 epochs, then the test accuracy
    make mnist ARGS="--resume --epochs 10"   go on with the newest run, to 10 epochs in all
    make mnist ARGS="--predict 7"            read test digit 7
    make mnist ARGS="--predict digit.png"    read a picture
    python recipes/mnist_mlp.py              the same without make

784-128-128-128-10 with tanh; Adam at 1e-3; batches of 256, the remainder dropped. The loss is the
squared error to one-hot targets, summed over the classes, mean over the batch.
On 2 CPU cores compile + epoch 1 take 2 to 4 s (1 s once the programs are cached), later epochs
0.4 to 0.6 s each. Test accuracy with seeds 0, 1, 2: 0.9655, 0.9636, 0.9643. Seed 0 prints, among
the rest, and then --predict 7 below a drawing of the digit:

    test accuracy: 0.9655

    test digit 7, labelled 9: read as 9
    9: 78.2%  1: 8.8%  2: 7.0%

Shapes: B batch, P pixels, H hidden, C classes.
"""

import itertools
import json
import sys
from datetime import datetime
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from command_line import make_parser
from jaxtrainer import Callback, Trainer, TrainModule, data
from jaxtrainer.callbacks import Accuracy, Checkpoint, Timer
from jaxtrainer.errors import CheckpointError, ConfigError, DataError
from mnist_data import NUM_CLASSES, NUM_PIXELS, MnistFileError, load_mnist, to_float
from mnist_image import ImageError, drawing, read_digit

RUNS = Path("runs/mnist_mlp")
OPTIONS_FILE = "options.json"
OPTIONS = {"epochs": 5, "batch_size": 256, "hidden_dim": 128, "learning_rate": 1e-3, "seed": 0}


class MLP(nnx.Module):
    def __init__(self, hidden_dim, rngs):
        sizes = [NUM_PIXELS, hidden_dim, hidden_dim, hidden_dim, NUM_CLASSES]
        self.layers = nnx.List(nnx.Linear(*pair, rngs=rngs) for pair in itertools.pairwise(sizes))

    def __call__(self, x_BP):
        *hidden, last = self.layers
        x_BH = x_BP
        for layer in hidden:
            x_BH = jnp.tanh(layer(x_BH))
        return last(x_BH)


class MnistMLP(TrainModule):
    def __init__(self, hidden_dim=128, learning_rate=1e-3):
        self.hidden_dim = hidden_dim
        self.learning_rate = learning_rate

    def configure_model(self, rngs):
        return MLP(self.hidden_dim, rngs)

    def configure_optimizers(self):
        return optax.adam(self.learning_rate)

    def training_step(self, model, batch):
        y_BC = model(batch["image"])
        target_BC = jax.nn.one_hot(batch["label"], NUM_CLASSES)
        loss = jnp.mean(jnp.sum((y_BC - target_BC) ** 2, axis=-1))
        return {"loss": loss, "logits": y_BC}

    validation_step = training_step  # and the test step, which defaults to it

    def predict_step(self, model, batch):
        # Least squares on one-hot targets estimates the probabilities themselves: no softmax.
        y_BC = jnp.clip(model(batch["image"]), 1e-6, 1.0)
        return y_BC / jnp.sum(y_BC, axis=-1, keepdims=True)


class SaveOptions(Callback):
    """Keeps the command line's options beside the checkpoints, for --resume and --predict."""

    def __init__(self, args):
        self.path = args.run_dir / OPTIONS_FILE
        self.options = {name: vars(args)[name] for name in OPTIONS}

    def on_fit_start(self, run):
        self.path.write_text(json.dumps(self.options))


def make_loaders(batch_size, seed):
    train_set, test_set = load_mnist()
    train_loader = data.from_arrays(
        train_set,
        batch_size=batch_size,
        shuffle=True,
        seed=seed,
        drop_remainder=True,
        device_transform=to_float,
    )
    return train_loader, data.from_arrays(test_set, batch_size=1000, device_transform=to_float)


def train(args):
    train_loader, test_loader = make_loaders(args.batch_size, args.seed)
    module = MnistMLP(args.hidden_dim, args.learning_rate)
    timer = Timer()
    callbacks = [timer, Accuracy(), Checkpoint(args.run_dir), SaveOptions(args)]
    trainer = Trainer(max_epochs=args.epochs, seed=args.seed, callbacks=callbacks)
    result = trainer.fit(module, train_loader, ckpt_path="last" if args.resume else None)
    if result.stop_reason == "interrupted":
        saved = "--resume goes on from there" if result.last_checkpoint else "nothing was saved"
        print(f"stopped after {result.num_steps} steps; {saved}")
        sys.exit(130)
    if not timer.epoch_times_s:
        print(f"nothing left to train; --epochs {2 * result.num_epochs} goes on")
    accuracy = trainer.test(module, test_loader, verbose=False)["test/accuracy"]
    print(f"test accuracy: {accuracy:.4f}")
    print(f"saved in {args.run_dir}; --predict 7 reads a digit with it")
    return accuracy


def predict(args):
    image, name = read_digit(args.predict)
    loader = data.from_arrays({"image": image[None]}, batch_size=1, device_transform=to_float)
    module, trainer = MnistMLP(args.hidden_dim), Trainer(enable_progress_bar=False)
    [p_BC] = trainer.predict(module, loader, ckpt_path=args.run_dir)
    best = np.argsort(-p_BC[0])
    print(drawing(image))
    print(f"{name}: read as {best[0]}")
    print("  ".join(f"{digit}: {p_BC[0, digit]:.1%}" for digit in best[:3]))
    return int(best[0])


def parse(argv):
    parser = make_parser(__doc__, **OPTIONS)
    add = parser.add_argument
    add("--run-dir", type=Path, help=f"default: a new one in {RUNS}, or the newest to go on from")
    add("--resume", action="store_true", help="go on from the run's last checkpoint")
    add("--predict", metavar="INDEX|IMAGE", help="read a test digit, or a picture of a digit")
    args = parser.parse_args(argv)
    if not args.resume and args.predict is None:
        args.run_dir = args.run_dir or RUNS / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
        if any(args.run_dir.glob("step_*")):
            parser.error(f"{args.run_dir} has a run; add --resume to go on from it")
        return args
    run_dir = args.run_dir or max((path.parent for path in RUNS.glob("*/step_*")), default=None)
    if run_dir is None:
        parser.error(f"there is no run in {RUNS} yet; train one, or name one with --run-dir")
    # What the run was trained with holds, unless the command line says otherwise.
    parser.set_defaults(run_dir=run_dir)
    if (run_dir / OPTIONS_FILE).exists():
        parser.set_defaults(**json.loads((run_dir / OPTIONS_FILE).read_text()))
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    return train(args) if args.predict is None else predict(args)


if __name__ == "__main__":
    try:
        main()
    except (CheckpointError, ConfigError, DataError, ImageError, MnistFileError, OSError) as error:
        sys.exit(f"error: {error}")
