"""A run, to look into: its numbers, its models, and what can be taken along."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hedgerow.errors import UserError
from hedgerow.names import MEMORY
from hedgerow.optional import check_installed
from hedgerow.runs import RunModels, model_at, opened
from hedgerow.runs.opening import Loader, check_client, check_round
from hedgerow.runs.rows import read_rows
from hedgerow.workers import Workers

if TYPE_CHECKING:
    import pandas

    from hedgerow.api.base import BaseInMemory
    from hedgerow.api.charts import Chart
    from hedgerow.api.draft import PathLike
    from hedgerow.data import Records
    from hedgerow.experiment import Experiment


class Run:
    """A run in its directory, or in a packed ledger.

    Attributes:
        path: the run's directory, or the file of its packed ledger.
        base: the base model, where it is in memory.
        test: the test rows, where they are in memory.
    """

    def __init__(
        self,
        path: Path,
        *,
        overrides: Sequence[str] = (),
        base: BaseInMemory | None = None,
        test: Records | None = None,
    ) -> None:
        """Open a run; `hr.run` and `hr.open_run` do so.

        Args:
            path: as the attribute, and so are `base` and `test`.
            overrides: `key.path=value`, on top of the run's experiment.

        Raises:
            UserError: there is no run.
        """
        self.path = path.absolute()
        self._overrides, self.base = list(overrides), base
        self.test = test
        with opened(path, self._overrides) as (experiment, _):
            self._experiment = experiment

    @property
    def experiment(self) -> Experiment:
        """Experiment of the run, with every default."""
        return self._experiment

    @property
    def metrics(self) -> pandas.DataFrame:
        """Numbers of each round: metrics.jsonl, one row a round, round 0 before training."""
        import pandas

        return pandas.DataFrame(self._rows())

    @property
    def rounds(self) -> int:
        """Number of rounds that are in the ledger."""
        with opened(self.path, self._overrides) as (_, ledger):
            return len(ledger)

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer of the base model, from transformers."""
        if self.base is not None:
            return self.base.tokenizer
        from hedgerow.loading import load_tokenizer

        return load_tokenizer(self._experiment.model)

    def model(self, round: int | None = None, client: str | None = None) -> Any:
        """Model after a round, adapters merged: a transformers model of your own.

        One whose base is quantized is in float32, and computes what the run's does.

        Args:
            round: number of the round, 0 for the base; None for the last.
            client: name of the client whose model is meant, for methods without a global one.

        Raises:
            UserError: there is no such round or client, or the base is not to be had.
        """
        with opened(self.path, self._overrides) as (experiment, ledger):
            number = check_round(ledger, round)
            if number:
                check_client(experiment, ledger, client)
            model = model_at(experiment, ledger, number, self._load)
            model.make_float()
            if number:
                RunModels(experiment.method, ledger, number).merge(model, client)
            return model.network.requires_grad_(True)

    def evaluate(
        self,
        data: Any = None,
        *overrides: str,
        metrics: Sequence[str] | None = None,
        by: str | None = None,
        round: int | None = None,
        client: str | None = None,
        workers: int | str = 1,
    ) -> dict[str, Any]:
        """Scores of the model after a round, by name, as in a row of `metrics`.

        Args:
            data: file or rows to evaluate on; None for the run's own test data.
            overrides: `key.path=value`, as `data.prompt=plain`.
            metrics: names of metrics; None for the run's own.
            by: column whose values are also scored each by itself.
            round: number of the round; None for the last.
            client: name of the client whose model is meant; None for all.
            workers: number of processes that take batches side by side, in one thread each;
                `auto`: as many as there are free processors. On Linux, of models on the CPU.

        Raises:
            UserError: naming what does not fit.
        """
        from hedgerow.data.in_memory import as_records
        from hedgerow.runs.scoring import asked_for, score_path

        changes, held, named = [*self._overrides, *overrides], self.test, None
        if isinstance(metrics, str):
            raise UserError(f"metrics= must be a list of names, as [{metrics!r}]")
        if data is None and held is not None:
            changes.append(_override("data.test", MEMORY))
        if data is not None:
            named = str(data) if isinstance(data, str | Path) else MEMORY
            held = as_records(data, "data=") if named == MEMORY else None
        changes = asked_for(named, metrics, by, changes)
        scores, _ = score_path(
            self.path,
            changes,
            round,
            client,
            load=self._load,
            held=held,
            own_tests=data is None,
            workers=Workers.of(workers),
        )
        return scores

    def audit(
        self, *overrides: str, client: str | None = None, rows: int | None = None
    ) -> dict[str, Any]:
        """Examine what left each client, and what the model tells of clients' rows.

        What is found is written into `audit.json` in the run's directory, too, which `hr.report`
        shows. Where the experiment has planted canaries (section `audit`), there is a lower bound
        of ε beside the promised one.

        Args:
            overrides: `key.path=value`, as where the data lie now.
            client: name of the client whose rows are compared with test rows; None for all.
            rows: largest number of rows of a client, and of others, that are compared; None for
                200.

        Returns:
            `left` (of each client), `members` (how well its rows are told from others), `planted`
            (of canaries; None without any), `private` (what is promised) and more, as `audit.json`
            has them.

        Raises:
            UserError: naming what does not fit.
        """
        from hedgerow.audit import examining

        changes = [*self._overrides, *overrides]
        if self.test is not None:
            changes.append(_override("data.test", MEMORY))
        if rows is not None and rows < 1:
            raise UserError(f"audit: rows={rows}: give 1 or more")
        found = examining.audit(
            self.path,
            changes,
            client,
            examining.ROWS if rows is None else rows,
            load=self._load,
            held=self.test,
        )
        return found.model_dump()

    def answer(
        self,
        prompts: Sequence[str],
        *,
        round: int | None = None,
        client: str | None = None,
        max_new_tokens: int | None = None,
    ) -> list[str]:
        """Greedy answers of the model after a round.

        Args:
            prompts: instructions, which the run's own template (`data.prompt`) wraps.
            round: number of the round, 0 for the base; None for the last.
            client: name of the client whose model is meant, for methods without a global one.
            max_new_tokens: longest answer in tokens; None for `evaluation.max_new_tokens`.

        Returns:
            One text for each prompt.
        """
        import numpy

        from hedgerow.data import Encoder, Row, load_template
        from hedgerow.evaluation.answers import generate
        from hedgerow.model import Model, max_positions

        if isinstance(prompts, str):
            raise UserError("answer: prompts must be a list of texts, as ['What is a hedge?']")
        settings = self._experiment
        longest = settings.evaluation.max_new_tokens if max_new_tokens is None else max_new_tokens
        model = Model(self.model(round, client), self.tokenizer, self.path.name)
        if not 0 < longest < max_positions(model.network):
            most = max_positions(model.network) - 1
            raise UserError(f"answer: max_new_tokens={longest}: give 1 to {most}")
        if not prompts:
            return []
        template = load_template(settings.data, self.tokenizer)
        encoder = Encoder(template, self.tokenizer, model.vocabulary_size)
        rows = [Row(prompt, number=number) for number, prompt in enumerate(prompts, start=1)]
        encoded = encoder.prompts(rows, "answer: prompts")
        answers, _ = generate(
            model,
            [numpy.array(ids, dtype=numpy.int32) for ids in encoded],
            longest,
            settings.evaluation.batch_size,
            lambda _: None,
            ends=template.ends,
            stop=settings.evaluation.stop,
        )
        return answers

    def chart(self, score: str = "eval_loss") -> Chart:
        """Chart of a score by round, an altair chart, which notebooks show.

        Args:
            score: a column of `metrics`.

        Raises:
            UserError: there is no such score, or what draws charts is not installed.
        """
        check_installed("a chart", "altair", "vl_convert")
        from hedgerow.api.charts import by_round

        rows = [row for row in self._rows() if row.get(score) is not None]
        if not rows:
            known = sorted({key for row in self._rows() for key, v in row.items() if _is_number(v)})
            raise UserError(f"chart: the run has no score {score!r} (known: {', '.join(known)})")
        return by_round(rows, score, title=self.path.name)

    def export_adapter(
        self,
        out: PathLike,
        *,
        round: int | None = None,
        client: str | None = None,
        rank: int | None = None,
        energy: float | None = None,
        dtype: str | None = None,
    ) -> Path:
        """Write all that the run adds to its base as an adapter that peft loads.

        Nothing is lost unless `rank` or `energy` asks for it. All factors have one rank, at most
        the smaller side of the largest matrix.

        Args:
            out: folder to make.
            round: number of the round; None for the last.
            client: name of the client whose model is meant, for methods without a global one.
            rank: highest rank of a matrix; None cuts nothing.
            energy: share of the squared singular values that is kept, above 0 and at most 1.
            dtype: of the factors: float32, bfloat16 or float16; None for the run's own.

        Returns:
            The folder.

        Raises:
            UserError: the method makes no adapter, `out` is there already, or a value is not
                finite in the dtype.
        """
        from hedgerow import export

        export.to_adapter(
            self.path,
            Path(out),
            round,
            client,
            self._overrides,
            rank=rank,
            energy=energy,
            dtype=dtype,
            base=None if self.base is None else self.base.place,
            load=self._load,
        )
        return Path(out)

    def export_merged(
        self,
        out: PathLike,
        *,
        round: int | None = None,
        client: str | None = None,
        dtype: str | None = None,
    ) -> Path:
        """Write the whole model as a folder that transformers loads.

        Args:
            out: folder to make.
            round: number of the round; None for the last.
            client: name of the client whose model is meant, for methods without a global one.
            dtype: of the weights: float32, bfloat16 or float16; None for the run's own.

        Returns:
            The folder.

        Raises:
            UserError: `out` is there already, there is no such round or client, or a weight is not
                finite in the dtype.
        """
        from hedgerow import export

        export.to_merged(
            self.path, Path(out), round, client, self._overrides, dtype=dtype, load=self._load
        )
        return Path(out)

    def export_ledger(self, out: PathLike) -> Path:
        """Write ledger and experiment as one file, which `hr.open_run` opens.

        Args:
            out: file to make.

        Returns:
            The file.
        """
        from hedgerow import export

        export.to_ledger(self.path, Path(out), self._overrides)
        return Path(out)

    def rollback(self, round: int) -> list[str]:
        """Take the run back to what it was after a round; `hr.run(…, resume=True)` goes on there.

        Entries, rows of metrics, kept updates and memories of later rounds are removed for good;
        the account of privacy stays as it is.

        Args:
            round: number of the round, 0 for before training.

        Returns:
            Sentences on what is not as it was, as memories that are not kept any more.

        Raises:
            UserError: there is no such round, this is a packed ledger, another process has the run
                open, or a file of it is damaged; nothing has been changed.
        """
        from hedgerow.runs.rollback import roll_back

        return roll_back(self.path, round)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}: {self._experiment.method.name}, {self.rounds} rounds)"

    def _repr_html_(self) -> str:
        """The run's numbers, in a notebook."""
        if self.path.is_file():
            return f"<b>{html.escape(repr(self))}</b>"
        import pandas

        from hedgerow.console import named_scores

        metrics = self._experiment.evaluation.metrics
        scores = [{"round": row["round"], **named_scores(row, metrics)} for row in self._rows()]

        return f"<b>{html.escape(repr(self))}</b>{pandas.DataFrame(scores).to_html(index=False)}"

    @property
    def _load(self) -> Loader:
        from hedgerow.model import Model

        return Model.load if self.base is None else self.base.load

    def _rows(self) -> list[dict[str, Any]]:
        if self.path.is_file():
            raise UserError(f"{self.path} is a packed ledger, which has no metrics: use evaluate()")
        if not self.path.is_dir():
            raise UserError(f"{self.path} is not there any more")
        return read_rows(self.path)


def _override(key: str, value: Any) -> str:
    return f"{key}={json.dumps(value)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
