"""Trains two networks against each other: one draws digits, the other tells them from real ones.

    python recipes/mnist_gan.py       20 epochs; a picture after each in runs/mnist_gan/images

Each step makes two updates: the critic's, on a batch of digits and one of drawings, and the
generator's, on the same drawings. Either has an optimiser of its own. Drawn and scored is a moving
average of the weights, which is steadier than the weights themselves. Each logger gets the
pictures; the one here writes them as PNG.

The score is the Frechet distance between the pixels of 10,000 drawings and those of the test
digits: of two normal distributions with their means and covariances. It tells how varied they are;
how sharp they are is for the eye. Other real digits have 0.4, and ones alone 48; drawings with
seeds 0, 1, 2 have 12.73, 10.76, 13.24. It takes 4 minutes of CPU time (2 cores, no GPU). Seed 0
prints, at the end:

    Frechet distance to the test digits: 12.73
    drawings after each epoch: runs/mnist_gan/images

Shapes: B batch, Z noise, P pixels.
"""

import itertools
from functools import partial

import jax
import numpy as np
import optax
from flax import nnx

from command_line import make_parser
from jaxtrainer import Optimizer, Trainer, TrainModule, data
from jaxtrainer.callbacks import EMA, Timer
from jaxtrainer.loggers import JSONLinesLogger
from mnist_data import NUM_PIXELS, load_mnist, to_float

RUN = "runs/mnist_gan"
NOISE_DIM = 64
NUM_SHOWN, COLUMNS = 100, 10
NUM_SCORED = 10_000


def make_generator(hidden_dim, rngs):
    return nnx.Sequential(
        nnx.Linear(NOISE_DIM, hidden_dim // 2, rngs=rngs),
        nnx.BatchNorm(hidden_dim // 2, rngs=rngs),
        nnx.relu,
        nnx.Linear(hidden_dim // 2, hidden_dim, rngs=rngs),
        nnx.BatchNorm(hidden_dim, rngs=rngs),
        nnx.relu,
        nnx.Linear(hidden_dim, NUM_PIXELS, rngs=rngs),
        nnx.sigmoid,
    )


def make_critic(hidden_dim, rngs):
    sizes = itertools.pairwise([NUM_PIXELS, hidden_dim, hidden_dim // 2, 1])
    first, second, last = (nnx.Linear(*pair, rngs=rngs) for pair in sizes)
    leak, dropout = partial(nnx.leaky_relu, negative_slope=0.2), nnx.Dropout(0.3, rngs=rngs)
    return nnx.Sequential(first, leak, dropout, second, leak, dropout, last)


class GAN(nnx.Module):
    def __init__(self, hidden_dim, rngs):
        self.generator = make_generator(hidden_dim, rngs)
        self.critic = make_critic(hidden_dim, rngs)


class MnistGAN(TrainModule):
    automatic_optimization = False

    def __init__(self, hidden_dim=512, learning_rate=2e-4):
        self.hidden_dim = hidden_dim
        self.learning_rate = learning_rate

    def configure_model(self, rngs):
        return GAN(self.hidden_dim, rngs)

    def configure_optimizers(self):
        adam = optax.adam(self.learning_rate, b1=0.5)
        return {name: Optimizer(adam, wrt=name) for name in ("critic", "generator")}

    def training_step(self, model, batch):
        x_BP = batch["image"]
        z_BZ = jax.random.normal(self.make_rng(), (len(x_BP), NOISE_DIM))

        def critic_loss(model):
            real_B, drawn_B = model.critic(x_BP), model.critic(model.generator(z_BZ))
            # -log of the probability that digits are real, and drawings are not.
            return nnx.softplus(-real_B).mean() + nnx.softplus(drawn_B).mean()

        def generator_loss(model):
            return nnx.softplus(-model.critic(model.generator(z_BZ))).mean()

        loss, model = self.minimize(critic_loss, model, "critic")
        self.log("critic_loss", loss, prog_bar=True)
        loss, model = self.minimize(generator_loss, model, "generator")
        self.log("generator_loss", loss, prog_bar=True)

    def validation_step(self, model, batch):
        self.log("_drawings", self.predict_step(model, batch))

    def predict_step(self, model, batch):
        return model.generator(batch["noise"]).reshape(-1, 28, 28)

    def on_validation_epoch_end(self, run):
        if run.stage == "validate":  # not the sanity check
            run.log_image("drawings", run.arrays["val/_drawings"], columns=COLUMNS)


def frechet_distance(a_NP, b_NP):
    """Distance of two normal distributions: Dowson, Landau, 1982, equation 4 (squared)."""
    covariances = np.cov(a_NP, rowvar=False), np.cov(b_NP, rowvar=False)
    # Eigenvalues of a product of covariances are real and not negative, but for rounding.
    products = np.linalg.eigvals(covariances[0] @ covariances[1]).real
    spread = sum(map(np.trace, covariances)) - 2 * np.sqrt(np.maximum(products, 0)).sum()
    return float(np.sum((a_NP.mean(axis=0) - b_NP.mean(axis=0)) ** 2) + spread)


def make_noise(count, batch_size, seed):
    noise = np.random.default_rng(seed).normal(size=(count, NOISE_DIM)).astype(np.float32)
    return data.from_arrays({"noise": noise}, batch_size=batch_size)


def main(argv=None):
    parser = make_parser(__doc__, epochs=20, batch_size=128, hidden_dim=512, seed=0)
    args = parser.parse_args(argv)
    train_set, test_set = load_mnist()
    loader = data.from_arrays(
        {"image": train_set["image"]},
        batch_size=args.batch_size,
        shuffle=True,
        seed=args.seed,
        drop_remainder=True,
        device_transform=to_float,
    )
    module = MnistGAN(args.hidden_dim)
    trainer = Trainer(
        max_epochs=args.epochs,
        seed=args.seed,
        callbacks=[Timer(), EMA(0.999, warmup=True)],
        logger=JSONLinesLogger(RUN),
    )
    # The same noise after each epoch, so that one sees each drawing change.
    trainer.fit(module, loader, make_noise(NUM_SHOWN, NUM_SHOWN, args.seed))
    drawings = np.concatenate(trainer.predict(module, make_noise(NUM_SCORED, 1000, args.seed + 1)))
    pixels = drawings.reshape(-1, NUM_PIXELS), test_set["image"].reshape(-1, NUM_PIXELS) / 255
    distance = frechet_distance(*pixels)
    print(f"Frechet distance to the test digits: {distance:.2f}")
    print(f"drawings after each epoch: {RUN}/images")
    return distance


if __name__ == "__main__":
    main()
