"""Whole experiments: their sections, and the method with its options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import (
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from hedgerow.errors import UserError
from hedgerow.evaluation.metrics import metrics_of
from hedgerow.experiment import yaml
from hedgerow.experiment.mistakes import (
    check_base,
    check_objective,
    check_says,
    check_secure,
    check_trainer,
    check_turns,
    method_of,
    says_of,
    with_kept,
    with_objective,
    with_optimizer,
    with_privacy,
    with_trainer,
    with_weights,
)
from hedgerow.methods.base import Expected, Method
from hedgerow.seeds import Seeds
from hedgerow.sentences import sentence
from hedgerow.settings import (
    AuditSettings,
    ClientFile,
    DataSettings,
    EvaluationSettings,
    FederationSettings,
    ModelSettings,
    PrivacySettings,
    SaysSettings,
    Section,
    TrackingSettings,
    TrainingSettings,
)
from hedgerow.training.objectives import Objective, objective_of
from hedgerow.training.optimizers import SHORTHANDS, optimizer_of


class Experiment(Section):
    """Whole experiment."""

    about: str | None = None
    """Sentence that says what the experiment is for: which table of which paper, say; null is
    none."""
    model: ModelSettings
    data: DataSettings
    federation: FederationSettings = FederationSettings()
    privacy: PrivacySettings | None = None
    """Differential privacy, as {level: client, clip: 0.5, epsilon: 8, delta: 1e-5}; null is
    none."""
    audit: AuditSettings | None = None
    """Canaries for `hedgerow audit`, as {client: north, canaries: 100}; null is none."""
    method: SerializeAsAny[Method]
    """Method, by its name or as {name: flora, ranks: 16} with its options."""
    training: TrainingSettings = Field(TrainingSettings(), validate_default=True)
    evaluation: EvaluationSettings = EvaluationSettings()
    tracking: TrackingSettings = TrackingSettings()

    def __init__(self, /, **sections: Any) -> None:
        """Check the sections, each given as a mapping or as its settings.

        Raises:
            UserError: naming the key that is wrong.
        """
        try:
            super().__init__(**sections)
        except ValidationError as error:
            raise UserError(sentence(error, type(self), ())) from None

    @field_validator("method", mode="before")
    @classmethod
    def _by_name(cls, method: Any) -> Method:
        return method if isinstance(method, Method) else method_of(method)

    @field_validator("method")
    @classmethod
    def _with_others(cls, method: Method, info: ValidationInfo) -> Method:
        privacy, federation = info.data.get("privacy"), info.data.get("federation")
        if "model" in info.data:
            check_base(method, info.data["model"].quantization, "model.quantization")
        if privacy is not None:
            method = with_privacy(method, privacy)
        if federation is not None:
            method = with_weights(method, federation.weights, federation.largest_share)
            check_secure(method, federation)
            check_turns(privacy, federation)
        return method

    @field_validator("training")
    @classmethod
    def _with_optimizer(cls, training: TrainingSettings, info: ValidationInfo) -> TrainingSettings:
        training = with_objective(with_optimizer(training))
        method = info.data.get("method")
        return training if method is None else with_kept(with_trainer(training, method), method)

    @field_validator("evaluation")
    @classmethod
    def _with_metrics(cls, evaluation: EvaluationSettings) -> EvaluationSettings:
        metrics_of(evaluation.metrics)
        return evaluation

    @model_validator(mode="after")
    def _evaluation_has_data(self) -> Experiment:
        if self.evaluation.by is not None and self.data.test is None:
            raise ValueError("`evaluation.by` needs `data.test`")
        return self

    @model_validator(mode="after")
    def _withheld_is_withheld(self) -> Experiment:
        check_says(self.method, self.training, self.federation, self.privacy)
        return self

    @model_validator(mode="after")
    def _privacy_holds_for_all_rows(self) -> Experiment:
        if self.privacy is not None and self.data.client_test is not None:
            raise ValueError(
                "`data.client_test`: clients' scores on rows of their own would leave them without "
                "noise, whatever `privacy` promises: leave it out, and give `data.test`"
            )
        return self

    @model_validator(mode="after")
    def _objective_fits(self) -> Experiment:
        if self.training.trainer is not None:
            check_trainer("training.trainer", self.method, self.training, self.privacy)
        check_objective(self.training, self.data, self.privacy, self.audit)
        return self

    @property
    def objective(self) -> Objective:
        """What local steps descend, with its options."""
        return objective_of(self.training)

    @property
    def says(self) -> SaysSettings:
        """What clients say beside their updates, in which nothing is null."""
        return says_of(self.federation, self.privacy)

    def deciding(self) -> dict[str, Any]:
        """What the entries of a run depend on as it is said, by section, in one form each.

        Of the base model and the data, fingerprint and digests decide instead, wherever they lie.
        Nothing else does.
        """
        left_out = {*SHORTHANDS, *TrainingSettings.beside}
        training = self.training.model_dump(mode="json", exclude=left_out)
        training["optimizer"] = optimizer_of(self.training).model_dump(mode="json")
        training["objective"] = self.objective.model_dump(mode="json")
        if self.training.epochs is None:
            training["steps"] = self.training.most_steps(1)
        privacy = None
        if self.privacy is not None:
            privacy = self.privacy.model_dump(mode="json")
            if self.privacy.noise_multiplier is None:
                privacy["rounds"] = self.federation.rounds  # which the noise is chosen for
        # Of a base whose weights are whole it decides nothing.
        rank = self.model.merged_rank
        return {
            "model": {} if rank is None else {"merged_rank": rank},
            "privacy": privacy,
            "audit": None if self.audit is None else self.audit.model_dump(mode="json"),
            "method": self.method.model_dump(mode="json"),
            "training": training,
            "federation": {
                **self.federation.model_dump(include=set(FederationSettings.decide)),
                "says": self.says.model_dump(include=set(SaysSettings.decide)),
            },
        }

    def expected(self, shapes: Mapping[str, Sequence[int]]) -> Expected:
        """What its settings say of what is sent in its run.

        Args:
            shapes: of what clients train (`Method.trained_shapes`).
        """
        silent = self.privacy is None and not self.says.losses
        secret = self.privacy is not None and self.privacy.level == "client"
        drawn = self.federation.clients_per_round if secret else None
        return Expected(
            seeds=Seeds(self.federation.seed),
            shapes=shapes,
            training=self.training,
            silent=silent,
            noisy=secret,
            drawn=drawn,
        )

    def dump(self, include: set[str] | None = None) -> str:
        """Experiment (or some of its sections) as YAML, with every default written out."""
        content = self.model_dump(mode="json", include=include)
        return yaml.dump(content)


def without_folders(experiment: Experiment) -> Experiment:
    """Experiment for others: with its files' names alone, and without its trackers.

    Where base and data lie and the run is followed is their owner's business.
    """

    def name(path: str | None) -> str | None:
        # What is not absolute is a name on the Hub, or a built-in one.
        return Path(path).name if path and Path(path).is_absolute() else path

    def own(files: str | list[str]) -> str | list[str]:
        return Path(files).name if isinstance(files, str) else [Path(file).name for file in files]

    def names(clients: Any) -> Any:
        if isinstance(clients, str):
            return name(clients)
        if isinstance(clients, dict):
            return {client: own(files) for client, files in clients.items()}
        if isinstance(clients, list):
            return [
                own(c) if isinstance(c, str) else ClientFile(name=c.name, file=own(c.file))
                for c in clients
            ]
        return clients

    data = experiment.data
    files = {"source": data.source, "test": data.test, "prompt": data.prompt}
    of_clients = {"clients": data.clients, "client_test": data.client_test}
    update = {
        **{key: names(value) for key, value in of_clients.items()},
        **{key: name(path) for key, path in files.items()},
    }
    path = experiment.model.path
    if Path(path).is_absolute():
        path = f"./{Path(path).name}"  # which is no name on the Hub
    changes = {
        "model": experiment.model.model_copy(update={"path": path}),
        "data": data.model_copy(update=update),
        "tracking": TrackingSettings(),
    }
    return experiment.model_copy(update=changes)
