"""Adversarial training of classifiers (TRADES), for mixtures alternately of router and experts as AdvMoE has it, and
tests under attacks that know the router."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import polars as pl
import torch
from jaxtyping import Float, Int
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from ..datasets.robustness import ImageBatch
from ..errors import UserError
from ..zoo.advmoe import RobustModel, RobustOutput
from ..zoo.core import Routed
from . import robustness_autoattack as autoattack
from .base import BaseTask
from .robustness_attacks import Attacker, Ball, Health, ascend, attackable, check_ball, router_logits, survive
from .robustness_losses import (
    balanced_groups,
    cross_entropy,
    divergence,
    log_probability,
    routers_cross_entropy,
    routers_divergence,
)
from .robustness_metrics import Attacked, evaluate, measure_cost

RouterTarget = Literal["mod", "cluster", "none"]
_NEAR = 1e-3  # standard deviation of the noise that a training attack starts from
_CURVE = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # of eps, in the picture
_CURVE_STEPS, _EXAMPLES = 10, 200
_TIMED_IMAGES = 64
_MOST_ZERO = 0.01  # share of images that PGD may find without any gradient
_CPU_IMAGES = 200  # that AutoAttack is run on without a GPU


class Examples(NamedTuple):
    """Test images for the picture, and what the attacks made of them; `expert` is -1 without router."""

    image: Float[Tensor, "images channels height width"]
    adversarial: Float[Tensor, "images channels height width"]
    label: Int[Tensor, " images"]
    said: Int[Tensor, "images 2"]  # clean, adversarial
    expert: Int[Tensor, "images 2"]


class RobustnessTask(BaseTask):
    """Trains and tests a `RobustModel` of the zoo on images in [0, 1].

    Every step crafts adversarial images by a few steps of PGD on KL(f(x) ‖ f(x')) and minimises
    CE(f(x), y) + beta KL(f(x) ‖ f(x')) (TRADES, Zhang et al. 2019). With `alternate` the experts do so while the router
    stands still; then images are crafted anew and the router minimises router_weight CE(R(x), expert of the class) +
    router_beta KL(R(x) ‖ R(x')). Their training attacks push on the routers' logits too.

    Args:
        model: a robustness model.
        optimizer: factory for the optimiser, of experts and routers each one.
        lr_scheduler: factory for the scheduler of each; one that sets rates itself (OneCycleLR) gives routers the
            experts' rate.
        eps: radius of the L∞ ball, in units of [0, 1]; 8/255 is 0.0314.
        train_steps, train_step_size: of the training attack; by default 1.25 eps over the steps.
        beta: weight of the KL.
        alternate: train router and experts in turn; without, one loss for all (AT(MoE)). Nothing to choose for
            networks without a router.
        router_target: the expert that a class belongs to: `mod`, class modulo E; `cluster`, groups of classes that look
            alike; `none`.
        router_weight, router_beta: of the router's two losses.
        router_lr: learning rate of the routers; by default a tenth of the experts'.
        router_attack: what the images of the router's turn are crafted against: `joint`, classes and routers;
            `router`, the routers alone, which costs a fraction.
        clip, router_clip: largest norm of the gradient of all but the routers, and of the routers'; null for none.
        schedule: step the scheduler after every `epoch` or `step`.
        val_steps: of PGD on the validation split, whose accuracy chooses the checkpoint.
        test_steps: of PGD in the test, with a step of eps / 4; 50 is usual.
        route_steps: of each route-aware attack, with a step of 2.5 eps / steps.
        attack_images: how many test images are attacked, from the first; None for all.
        autoattack: how many are given to AutoAttack; None for 200 on a CPU, all on a GPU, none without the extra.
        curve_images: how many the accuracy by eps is drawn from; at eps 1 it must break down.
        channels_last: memory format, quicker on GPUs.
        schema: the data's schema, linked by the command line.

    Raises:
        UserError: a value out of range.
    """

    model: RobustModel
    expert_of_class: Tensor
    mode = "max"
    monitor = "val/ra"
    headline = "ra_route"

    def __init__(
        self,
        model: RobustModel,
        optimizer: OptimizerCallable = torch.optim.SGD,
        lr_scheduler: LRSchedulerCallable | None = None,
        eps: float = 8 / 255,
        train_steps: int = 2,
        train_step_size: float | None = None,
        beta: float = 6.0,
        alternate: bool = True,
        router_target: RouterTarget = "mod",
        router_weight: float = 6.0,
        router_beta: float = 6.0,
        router_lr: float | None = None,
        router_attack: Literal["joint", "router"] = "joint",
        clip: float | None = None,
        router_clip: float | None = 1.0,
        schedule: Literal["epoch", "step"] = "epoch",
        val_steps: int = 10,
        test_steps: int = 50,
        route_steps: int = 20,
        attack_images: int | None = None,
        autoattack: int | None = None,
        curve_images: int = 100,
        channels_last: bool = False,
        schema: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(model, optimizer, lr_scheduler)
        self.automatic_optimization = False
        if min(beta, router_weight, router_beta) < 0 or any(
            most is not None and most <= 0 for most in (clip, router_clip)
        ):
            raise UserError(
                f"model: beta={beta}, router_weight={router_weight}, router_beta={router_beta}, clip={clip}, "
                f"router_clip={router_clip}: expected weights of 0 or more, and clips above 0 or null"
            )
        if train_steps < 1 or min(val_steps, test_steps, route_steps) < 1:
            raise UserError(
                f"model: train_steps={train_steps}, val_steps={val_steps}, test_steps={test_steps}, "
                f"route_steps={route_steps}: expected at least 1 of each"
            )
        size = 1.25 * eps / train_steps if train_step_size is None else train_step_size
        self.train_ball, self.val_ball = Ball(eps, train_steps, size), Ball(eps, val_steps, 2.5 * eps / val_steps)
        self.test_ball, self.route_ball = (
            Ball(eps, test_steps, eps / 4),
            Ball(eps, route_steps, 2.5 * eps / route_steps),
        )
        self.eps, self.beta, self.clip, self.router_clip, self.schedule = eps, beta, clip, router_clip, schedule
        self.router_weight, self.router_beta, self.router_lr = router_weight, router_beta, router_lr
        self.router_target, self.router_attack = router_target, router_attack
        self.attack_images, self.autoattack, self.channels_last = attack_images, autoattack, channels_last
        self.curve_images = curve_images
        self.schema = schema or {}
        self.routed = [part for part in model.modules() if isinstance(part, Routed)]
        self.alternate = alternate and bool(self.routed)
        self.experts = self.routed[0].router.num_experts if self.routed else 0
        classes = int(self.schema.get("num_classes", 0) or model.init_args["schema"]["num_classes"])
        group = torch.arange(classes) % max(self.experts, 1)
        if self.alternate and router_target == "cluster":
            group = torch.full((classes,), -1)  # found in the first epoch's images
        self.register_buffer("expert_of_class", group)
        self._health = Health()
        self._test: list[Attacked] = []
        self._attack_later: list[tuple[Tensor, Tensor, Tensor]] = []
        self._curve: list[Tensor] = []
        self.curve: dict[float, float] = {}
        self.examples: Examples | None = None
        self.flags: dict[str, str] = {}

    def forward(self, batch: ImageBatch) -> RobustOutput:
        """The model's output for the images of a batch."""
        output: RobustOutput = self.model(self._image(batch))
        return output

    def configure_optimizers(self) -> Any:
        """One optimiser, or with `alternate` one for the experts and what all share, one for the routers."""
        if not self.alternate:
            return self.optimise(self.model.parameters())
        experts = self.optimise(self.model.expert_parameters())
        lr = self.router_lr
        if lr is None:
            lr = 0.1 * float(experts["optimizer"].defaults["lr"])
        return [experts, self.optimise([{"params": list(self.model.router_parameters()), "lr": lr}])]

    def on_fit_start(self) -> None:
        if "16-mixed" in str(self.trainer.precision) and "bf16" not in str(self.trainer.precision):
            raise UserError(
                "trainer.precision=16-mixed: gradients of attacks underflow in it; use bf16-mixed or 32-true"
            )
        if self.channels_last:
            self.model.to(memory_format=torch.channels_last)

    def on_train_start(self) -> None:
        if int(self.expert_of_class.min()) < 0:
            self.expert_of_class.copy_(balanced_groups(self._class_means(), self.experts))

    def training_step(self, batch: ImageBatch, batch_idx: int) -> None:
        image, label = self._image(batch), batch.label.long()
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        self._experts_turn(image, label, optimizers[0])
        if self.alternate:
            self._routers_turn(image, label, optimizers[1])
        if self.schedule == "step":
            self._advance()

    def _experts_turn(self, image: Tensor, label: Tensor, optimizer: Any) -> None:
        adversarial = self._craft(image)
        self.model.train()
        if self.alternate:
            self.toggle_optimizer(optimizer)
            for part in self.routed:
                part.router.eval()
        clean, attacked = self.model(image), self.model(adversarial)
        kl = divergence(log_probability(clean.logits), log_probability(attacked.logits)).mean()
        ce = cross_entropy(clean.logits, label).mean()
        loss = ce + self.beta * kl + self.record(clean.routing)
        self._descend(loss, optimizer, self.clip)
        right = (attacked.logits.detach().argmax(-1) == label).float().mean()
        values = {"train/ce": ce.detach(), "train/kl": kl.detach(), "train/ra": right}
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(label))
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=len(label))

    def _routers_turn(self, image: Tensor, label: Tensor, optimizer: Any) -> None:
        adversarial = self._craft(image, routers_only=self.router_attack == "router")
        self.toggle_optimizer(optimizer)
        self.model.eval()
        for part in self.routed:
            part.router.train()
        clean, attacked = router_logits(self.model, image), router_logits(self.model, adversarial)
        log_p = {name: log_probability(logits) for name, logits in clean.items()}
        kl = torch.as_tensor(routers_divergence(log_p, attacked)).mean() / len(clean)
        loss = self.router_beta * kl
        if self.router_target != "none":
            expert = dict.fromkeys(clean, self.expert_of_class[label])
            ce = torch.as_tensor(routers_cross_entropy(clean, expert)).mean() / len(clean)
            loss = loss + self.router_weight * ce
            self.log("train/router_ce", ce.detach(), on_step=False, on_epoch=True, batch_size=len(label))
        self._descend(loss, optimizer, self.router_clip)
        self.model.train()
        self.log("train/router_kl", kl.detach(), on_step=False, on_epoch=True, batch_size=len(label))

    def _descend(self, loss: Tensor, optimizer: Any, clip: float | None) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        if clip is not None:
            self.clip_gradients(optimizer, clip, "norm")
        optimizer.step()
        if self.alternate:
            self.untoggle_optimizer(optimizer)

    def _craft(self, image: Tensor, routers_only: bool = False) -> Tensor:
        """Adversarial images of a training step, by the divergence from what the networks say of the clean ones."""
        # From the seed, the step and the process alone: a resumed run draws what a whole one would have.
        generator = self._generator(image, torch.initial_seed() + 7919 * self.trainer.global_step + self.global_rank)
        noise = torch.randn(image.shape, generator=generator, device=image.device, dtype=image.dtype)
        with attackable(self.model):
            with torch.no_grad():
                clean = None if routers_only else self.model(image)
                routers = router_logits(self.model, image) if clean is None else clean.router_logits
                log_p = None if clean is None else log_probability(clean.logits)
                log_r = {name: log_probability(logits) for name, logits in routers.items()} if self.alternate else {}

            def objective(x: Tensor) -> Tensor:
                if log_p is None:
                    return torch.as_tensor(routers_divergence(log_r, router_logits(self.model, x)))
                output = self.model(x)
                value = divergence(log_p, log_probability(output.logits))
                return value + routers_divergence(log_r, output.router_logits)

            return ascend(objective, image, self.train_ball, image + _NEAR * noise, self._health)

    def on_train_epoch_end(self) -> None:
        self._health.check()
        self._health = Health()
        if self.schedule == "epoch":
            self._advance()

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Accuracy, accuracy under PGD, and how often routers choose the expert of the class."""
        health = Health()
        with attackable(self.model):
            image, label = self._image(batch).clone(), batch.label.long().clone()
            attacker = Attacker(self.model, image, label, self._generator(image, batch_idx), health)
            self.record(attacker.clean.routing)
            adversarial = attacker.pgd(self.val_ball)
            with torch.no_grad():
                ra = (self.model(adversarial).logits.argmax(-1) == label).float().mean()
        health.check()
        options: dict[str, Any] = {"on_epoch": True, "sync_dist": True, "batch_size": len(label)}
        self.log("val/sa", (attacker.clean.logits.argmax(-1) == label).float().mean(), prog_bar=True, **options)
        self.log("val/ra", ra, prog_bar=True, **options)
        if self.alternate and self.router_target != "none" and not self.trainer.sanity_checking:
            right = torch.stack([route == self.expert_of_class[label] for route in attacker.route.values()])
            self.log("val/router_acc", right.float().mean(), **options)

    def on_test_start(self) -> None:
        self._test, self._attack_later, self._curve, self.curve = [], [], [], {}
        self.examples, self.flags, self._health = None, {}, Health()

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        with attackable(self.model), torch.autocast(self.device.type, enabled=False):
            image, label = self._image(batch).float().clone(), batch.label.long().clone()
            index = batch.index.long().clone()
            generator = self._generator(image, batch_idx)
            if self.attack_images is None:
                attacked = torch.ones_like(label, dtype=torch.bool)
            else:
                attacked = index < self.attack_images
            self._attack(image, label, index, attacked, generator)
            few = index < self.curve_images
            if bool(few.any()):
                self._curve.append(self._accuracy_by_eps(image[few], label[few], generator))
            chosen = index < self._auto_images()
            if bool(chosen.any()):
                self._attack_later.append((image[chosen], label[chosen], index[chosen]))

    def _attack(
        self, image: Tensor, label: Tensor, index: Tensor, attacked: Tensor, generator: torch.Generator
    ) -> None:
        attacker = Attacker(self.model, image, label, generator, self._health)
        self.record(attacker.clean.routing)
        routes = list(attacker.route.values())
        right = ~attacker.fooled
        shown = image
        pgd, route, flipped = torch.zeros_like(right), torch.zeros_like(right), torch.zeros_like(right)
        if bool((tried := attacked & right).any()):
            own = attacker.keep(tried)
            last = own.pgd(self.test_ball)
            check_ball(own.image, last, self.eps)
            shown = image.masked_scatter(tried[:, None, None, None], last)
            with torch.no_grad():
                pgd = pgd.masked_scatter(tried, self.model(last).logits.argmax(-1) == own.label)
            attacker.merge(own, tried)
        if bool(attacked.any()):
            own = attacker.keep(attacked)
            own.health = Health()
            survival = survive(own, self.route_ball)
            attacker.merge(own, attacked)
            route = route.masked_scatter(attacked, survival.robust)
            flipped = flipped.masked_scatter(attacked, survival.flipped)
            own.health.check()
        if self.examples is None:
            shown = torch.where(attacker.fooled[:, None, None, None], attacker.adversarial, shown)
            self.examples = self._examples(attacker, shown)
        expert = torch.stack(routes, 1) if routes else label.new_zeros(len(label), 0)
        fields = (index, label, right, attacked, pgd, route, flipped, expert)
        self._test.append(Attacked(*(values.cpu() for values in fields)))

    def _examples(self, attacker: Attacker, adversarial: Tensor) -> Examples:
        with torch.no_grad():
            after = self.model(adversarial)
        said = torch.stack([attacker.clean.logits.argmax(-1), after.logits.argmax(-1)], 1)
        expert = torch.full_like(said, -1)
        for name in list(attacker.route)[:1]:
            expert = torch.stack([attacker.route[name], after.router_logits[name].argmax(-1)], 1)
        fields = (attacker.image, adversarial, attacker.label, said, expert)
        return Examples(*(values[:_EXAMPLES].detach().cpu() for values in fields))

    def _accuracy_by_eps(self, image: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        """Whether each image is right after PGD, for the radii of the picture and for 1."""
        rows = []
        for eps in self._radii():
            attacker = Attacker(self.model, image, label, generator)
            attacker.pgd(Ball(eps, _CURVE_STEPS, 2.5 * eps / _CURVE_STEPS))
            rows.append(~attacker.fooled)
        return torch.stack(rows, 1).cpu()

    def _radii(self) -> list[float]:
        return [*(eps for share in _CURVE if (eps := share * self.eps) < 1), 1.0]

    def _auto_images(self) -> int:
        if self.autoattack is not None:
            return self.autoattack
        if not autoattack.available():
            return 0
        return _CPU_IMAGES if self.device.type == "cpu" else 10**9

    def on_test_epoch_end(self) -> None:
        self._health.check(_MOST_ZERO)
        table = Attacked(*(torch.cat(values) for values in zip(*self._gather(self._test), strict=True)))
        auto, cost = self._run_auto_attack(), None
        with attackable(self.model), torch.autocast(self.device.type, enabled=False):
            if self.examples is not None:
                image = self.examples.image[:_TIMED_IMAGES].to(self.device)
                cost = measure_cost(self.model, image)
        self.curve = self._sane_curve()
        self.result = evaluate(table, self.experts, cost, self.test_ball.steps, auto, self.flags)
        self.tested = table
        self.log_dict({f"test/{name}": value for name, value in self.result.metrics.items()}, sync_dist=True)

    def _run_auto_attack(self) -> dict[int, bool]:
        kept, self._attack_later = self._attack_later, []
        found: dict[int, bool] = {}
        if kept:
            image, label, index = (torch.cat(values) for values in zip(*kept, strict=True))
            with attackable(self.model), torch.autocast(self.device.type, enabled=False):
                outcome = autoattack.auto_attack(self.model, image, label, self.eps, progress=self.print)
            check_ball(image, outcome.adversarial, self.eps)
            self.flags = outcome.flags
            found = dict(zip(index.tolist(), outcome.robust.tolist(), strict=True))
        return {number: robust for part in self._gather([found]) for number, robust in part.items()}

    def _sane_curve(self) -> dict[float, float]:
        """Accuracy by radius.

        Raises:
            UserError: an attack that may change every pixel at will does not break the model: it finds nothing.
        """
        rows = self._gather(self._curve)
        self._curve = []
        if not rows:
            return {}
        right = torch.cat(rows).double().mean(0).tolist()
        most = max(0.1, 2.0 / len(self.expert_of_class))
        if right[-1] > most:
            raise UserError(
                f"an attack with eps = 1 leaves an accuracy of {right[-1]:.0%}; expected {most:.0%} or less, as any "
                "pixel may become anything: the model hides its gradients, and no robust accuracy of it can be trusted"
            )
        return dict(zip(self._radii(), right, strict=True))

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> pl.DataFrame:
        """One row an image: index, label, prediction and how sure, and each router's expert and how sure that is."""
        output = self(batch)
        sure, said = log_probability(output.logits).exp().max(-1)
        columns = {"index": batch.index.long(), "label": batch.label.long(), "prediction": said, "probability": sure}
        for name, logits in output.router_logits.items():
            suffix = "" if len(output.router_logits) == 1 else f"_{name}"
            certain, expert = log_probability(logits).exp().max(-1)
            columns |= {f"expert{suffix}": expert, f"expert{suffix}_probability": certain}
        return pl.DataFrame({name: values.detach().cpu().numpy() for name, values in columns.items()})

    def draw(self, folder: Path) -> list[Path]:
        """Images and what the attacks make of them, accuracy by eps, and who goes to which expert."""
        from . import robustness_plots

        assert self.examples is not None
        return robustness_plots.draw(
            self.examples, self.curve, self.tested, self.experts, self.eps, self.schema, folder
        )

    def _image(self, batch: ImageBatch) -> Tensor:
        if not self.channels_last:
            return batch.image
        return batch.image.contiguous(memory_format=torch.channels_last)

    def _advance(self) -> None:
        schedulers = self.lr_schedulers()
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            if scheduler is not None:
                scheduler.step()

    def _class_means(self) -> Float[Tensor, "classes features"]:
        """Mean image of each class, over the train images of all processes."""
        classes = len(self.expert_of_class)
        totals: Tensor | None = None
        counts = torch.zeros(classes, dtype=torch.float64)
        assert self.trainer.train_dataloader is not None
        for batch in self.trainer.train_dataloader:
            pixels, label = batch.image.flatten(1).double().cpu(), batch.label.long().cpu()
            totals = pixels.new_zeros(classes, pixels.shape[1]) if totals is None else totals
            totals.index_add_(0, label, pixels)
            counts += torch.bincount(label, minlength=classes)
        assert totals is not None
        gathered = self._gather([(totals, counts)])
        total = torch.stack([part[0] for part in gathered]).sum(0)
        count = torch.stack([part[1] for part in gathered]).sum(0)
        return total / count.clamp(min=1)[:, None]

    def _gather(self, parts: list[Any]) -> list[Any]:
        """Those of all processes."""
        if self.trainer.world_size == 1:
            return parts
        gathered: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(gathered, parts)
        return [part for own in gathered for part in own]

    def _generator(self, image: Tensor, seed: int) -> torch.Generator:
        return torch.Generator(image.device).manual_seed(seed % (1 << 62))
