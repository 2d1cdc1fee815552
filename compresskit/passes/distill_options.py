"""What `distill` can be told beside how to train, and which of it suits a model and its teachers."""

from collections.abc import Sequence

from pydantic import Field, model_validator
from transformers import PreTrainedModel

from compresskit.config import Config
from compresskit.data import DataSource
from compresskit.distill.cached import Keep
from compresskit.distill.goals import Blocks
from compresskit.distill.losses import KL, AnyLoss, Contrastive, Hidden, Loss
from compresskit.distill.options import TrainingOptions
from compresskit.distill.outputs import has_head
from compresskit.distill.parameters import choose_parameters, find_factors
from compresskit.distill.several import Conflict, Rule, Trust
from compresskit.distill.tracking import require_tracker
from compresskit.errors import CompressKitError, ManyErrors
from compresskit.models import answer_kind

#: Names of teachers that are no models elsewhere.
ORIGINAL, AVERAGE = "original", "average"


class TeacherCache(Config):
    """What of the teacher's answers is kept on the disk, and where."""

    keep: Keep = Field(
        default="hidden", description="states before its head (exact), or its `k` largest logits (small)"
    )
    k: int = Field(default=64, ge=1, description="logits that top_k keeps of each token")
    path: str | None = Field(default=None, description="folder for it; by default one of the cache folder, by its key")


class WeighedTeacher(Config):
    """One of several teachers."""

    model: str = Field(
        description="a model of the same tokenizer, a checkpoint, `original`, or `average` (of the student, moving)"
    )
    weight: float = Field(default=1.0, gt=0, description="what it counts beside the others")


#: Share of cross-entropy in what language models learn by default.
LABELS = 0.05


def default_losses(model: PreTrainedModel) -> tuple[Loss, ...]:
    """KL on logits for a model with a head over classes or tokens; hidden states of every block for any other.

    Language models learn a little of the text itself (`LABELS`): with little text, KL alone leaves a higher perplexity
    where they are trained than cross-entropy does, and so small a share hardly moves them away from the original
    (docs/measurements.md, Recovery).

    Hidden states are compared by direction, since their length is the next norm's to set: all-MiniLM-L6-v2 with
    fewer neurons and heads came nearer to the original so than by relative squared error at the same rate, in 20, 80
    and 320 steps of 32 texts, with fewer blocks in 20 and 80; by `embedding` alone it gained nothing within 80.
    """
    if answer_kind(model) != "classes":
        return (Hidden(measure="cosine"),)
    return (KL(alpha=LABELS if model.can_generate() else 0.0),)


class DistillOptions(TrainingOptions):
    """Losses, teachers, and what is watched."""

    losses: tuple[AnyLoss, ...] | None = Field(
        default=None,
        min_length=1,
        description=f"what to agree on; by default kl (language models: alpha {LABELS}), without head hidden (cosine)",
    )

    teacher: str | None = Field(
        default=None,
        description="another model of the same tokenizer to learn from, an earlier checkpoint, or `average`: "
        "the student's own moving average; by default the original",
    )
    teachers: tuple[WeighedTeacher, ...] | None = Field(
        default=None, min_length=2, description="several teachers instead, each with its weight"
    )
    conflict: Conflict | None = Field(
        default=None,
        description="where teachers contradict each other: average them (default), trust one (route), or leave it out "
        "(drop)",
    )
    conflict_above: float | None = Field(
        default=None, ge=0, lt=1, description="disagreement from 0 to 1, above which they contradict (default 0.2)"
    )
    trust: Trust | None = Field(
        default=None,
        description="whom route trusts: who foresaw the next token (labels), agrees with most, or is surest (entropy); "
        "by default labels for language models, else majority of three or more, else entropy",
    )
    decay: float | None = Field(default=None, ge=0, lt=1, description="of the moving average, per step (default 0.99)")
    cache: TeacherCache | None = Field(
        default=None, description="keep what the teacher says on the disk, for this and later students; by default not"
    )
    tracker: str | None = Field(
        default=None, description="where accelerate tells how it goes: tensorboard, wandb, … (its package is needed)"
    )
    tracker_folder: str | None = Field(default=None, description="folder for trackers that write files (default runs)")
    other_text: DataSource | None = Field(
        default=None, description="text of another kind, its evaluation part: a warning where the student loses there"
    )

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> "DistillOptions":
        if self.teachers is None:
            self._refuse_alone(("conflict", "conflict_above", "trust"), "teachers")
        elif self.teacher is not None:
            raise ValueError("teacher and teachers are both said; put all into teachers")
        elif self.cache is not None:
            raise ValueError("cache keeps what one teacher says; leave it out, or teachers")
        elif self.conflict != "route":
            self._refuse_alone(("trust",), "conflict: route")
        if self.tracker is None:
            self._refuse_alone(("tracker_folder",), "tracker")
        if AVERAGE not in self.names:
            self._refuse_alone(("decay",), "a teacher `average`")
        elif self.cache is not None or self.block_steps:
            name = "cache" if self.cache is not None else "block_steps"
            raise ValueError(f"{name} needs a teacher that stays as it is; leave it out, or `average`")
        return self

    def _refuse_alone(self, names: Sequence[str], needs: str) -> None:
        for name in names:
            if getattr(self, name) is not None:
                self._refuse_idle(name, needs)

    @property
    def names(self) -> tuple[str, ...]:
        """The teachers as the recipe names them."""
        if self.teachers is not None:
            return tuple(one.model for one in self.teachers)
        return (self.teacher or ORIGINAL,)

    @property
    def places(self) -> tuple[str, ...]:
        """Where the recipe names each of them."""
        return ("teacher",) if self.teachers is None else tuple(f"teachers[{i}].model" for i in range(len(self.names)))

    def check(self, model: PreTrainedModel, shapes: Sequence[PreTrainedModel]) -> None:
        """Refuse what does not suit a student and its teachers, given by models of their shapes.

        Raises:
            CompressKitError: with what suits instead.
        """
        losses, *_ = [self.checked_losses(model, shape) for shape in shapes]
        self._check_cache(losses, model)
        self.check_teachers(losses, model, shapes)
        self._check_token_weight(model)
        chosen = choose_parameters(model, self.train, self.freeze)
        if self.turns is not None:
            find_factors(model, chosen)
        if self.block_steps:
            Blocks(model, shapes[0])
        if self.tracker is not None:
            require_tracker(self.tracker)

    def _check_token_weight(self, model: PreTrainedModel) -> None:
        per_token = has_head(model) and "SequenceClassification" not in type(model).__name__
        if self.token_weight == "even" or (model.can_generate() if self.token_weight == "tsld" else per_token):
            return
        told = "what it says of each next token" if self.token_weight == "tsld" else "its predictions for each token"
        what = f"{self.token_weight} weighs tokens by {told}, and {type(model).__name__} gives none"
        raise CompressKitError(what, where="token_weight", fix="leave token_weight out")

    def check_teachers(
        self, losses: tuple[Loss, ...], model: PreTrainedModel, shapes: Sequence[PreTrainedModel]
    ) -> None:
        """Refuse several teachers that cannot be brought together, and one that has nothing to teach."""
        if self.teachers is None:
            moves = any(isinstance(loss, Contrastive) or (isinstance(loss, KL) and loss.alpha) for loss in losses)
            if self.names == (AVERAGE,) and not (self.losses and moves):
                what = (
                    "the average of the student begins as the student, and agrees with it: little or nothing is learnt"
                )
                fix = "say losses: kl with an alpha (labels) or contrastive, or name it beside the original in teachers"
                raise CompressKitError(what, where="teacher", fix=fix)
            return
        inner = [loss.kind for loss in losses if loss.asks(model) - {"predictions", "sentence"}]
        if inner or self.block_steps:
            said = f"loss {inner[0]} reads" if inner else "block_steps reads"
            fix = "use one teacher, or kl, embedding and contrastive alone"
            raise CompressKitError(f"{said} inner layers, which teachers cannot agree on", where="teachers", fix=fix)
        widths = sorted({shape.config.get_text_config().hidden_size for shape in shapes})
        embeds = any("sentence" in loss.asks(model) for loss in losses)
        if embeds and len(widths) > 1:
            what = f"embeddings of {' and '.join(map(str, widths))} numbers cannot be averaged"
            raise CompressKitError(what, where="teachers", fix="use teachers of one width, or kl alone")
        if self.conflict == "route":
            self._check_trust(model, embeds)

    def _check_trust(self, model: PreTrainedModel, embeds: bool) -> None:
        trust = self._trust(model)
        if trust == "labels" and not model.can_generate():
            what = f"only a language model's text holds labels, and {type(model).__name__} is none"
            raise CompressKitError(what, where="trust", fix="use majority or entropy")
        if (trust == "majority" or embeds) and len(self.names) < 3:
            what = "of two teachers that contradict each other none is in the majority"
            if embeds:
                what += ", and nothing else tells whose embedding is right"
            raise CompressKitError(what, where="conflict", fix="use three teachers or more, or conflict: drop")

    def rule(self, model: PreTrainedModel) -> Rule:
        """How conflicts of teachers are settled, with what was not said."""
        threshold = Rule.threshold if self.conflict_above is None else self.conflict_above
        return Rule(self.conflict or "average", self._trust(model), threshold)

    def _trust(self, model: PreTrainedModel) -> Trust:
        if self.trust is not None:
            return self.trust
        if model.can_generate():
            return "labels"
        return "majority" if len(self.names) > 2 or not has_head(model) else "entropy"

    def _check_cache(self, losses: tuple[Loss, ...], model: PreTrainedModel) -> None:
        if self.cache is None:
            return
        inner = [f"loss {loss.kind}" for loss in losses if loss.asks(model) - {"predictions", "sentence"}]
        inner += ["block_steps"] if self.block_steps else []
        if inner:
            what = f"{inner[0]} reads inner layers of the teacher, which are too large to keep"
            raise CompressKitError(
                what, where="cache", fix="leave cache out, or use kl, embedding and contrastive alone"
            )
        if self.cache.keep == "top_k" and self.token_weight != "even":
            what = f"token_weight {self.token_weight} reads all that the teacher says"
            raise CompressKitError(what, where="cache.keep", fix="use keep: hidden")
        if len({loss.temperature for loss in losses if isinstance(loss, KL)}) > 1 and self.cache.keep == "top_k":
            what = "two kl losses of different temperatures cannot read one top k"
            raise CompressKitError(what, where="cache.keep", fix="use keep: hidden")

    def checked_losses(self, model: PreTrainedModel, original: PreTrainedModel) -> tuple[Loss, ...]:
        """The losses, said or not, that suit the student and this teacher.

        Raises:
            CompressKitError: one that does not; all of them at once.
        """
        losses, errors = self.losses or default_losses(model), []
        for i, loss in enumerate(losses):
            try:
                loss.check(model, original)
            except CompressKitError as error:
                errors.append(error.at(f"losses[{i}]"))
        if len(errors) > 1:
            raise ManyErrors(errors)
        if errors:
            raise errors[0]
        return losses
