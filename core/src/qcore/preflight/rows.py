"""Opening of a model for its rows alone: config, tokenizer and chat template, no weights.

This file decides what ``qcore data`` needs of a model, and that its rows are read as those of a
training run with the same settings. `qcore.data.rendering.renderer` renders them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..checkpoint.checkpoint import required_template
from ..checkpoint.tokenizer import load_tokenizer
from ..data.policies import Policies
from ..data.rejects import Rejects
from ..data.rendering.renderer import Options, Renderer
from ..data.rendering.template_kwargs import special_tokens
from ..plugins.resolve_model import Identified, identify_files
from .checks import line
from .modality import reader_of, unread
from .tokenizer_findings import normalize_of, tokenizer_findings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ..api.media import MediaReader
    from ..api.records import ChatFormat
    from ..config.settings import Settings
    from ..reporting import Reporter


@dataclass(frozen=True, slots=True, kw_only=True)
class RowModel:
    """What renders and tokenizes rows for a model.

    Attributes:
        name: as the user named it.
        model: the checkpoint and its plugins; no tensor is located.
        chat_format: the format of rendered conversations.
        tokenizer: of the checkpoint.
        reader: reads media; ``None`` if the model is text only.
        settings: of the run.
    """

    name: str
    model: Identified
    chat_format: ChatFormat
    tokenizer: Tokenizer
    reader: MediaReader | None
    settings: Settings

    @contextmanager
    def renderer(
        self,
        *,
        explain: bool = False,
        only: Collection[int] = (),
        advance: Callable[[int], None] | None = None,
    ) -> Iterator[Renderer]:
        """A renderer of rows, checked against the model, with a template process of its own.

        Args:
            explain: whether samples keep the reason of each token.
            only: numbers of the rows to render; empty: all rows.
            advance: called with the number of bytes read since the last call.

        Raises:
            QcoreError: as `Renderer`; ``QC-PRE-001`` no chat template.
        """
        settings, checkpoint = self.settings, self.model.checkpoint
        policies = Policies.of(settings)
        options = Options(
            policies=policies,
            max_length=settings.max_length,
            variables=settings.chat_template_kwargs,
            special=special_tokens(checkpoint.tokenizer_config),
            reader=self.reader,
            unread="" if self.reader is not None else unread(self.model),
            explain=explain,
            seed=settings.seed,
            workers=settings.dataset_num_proc,
            only=frozenset(only),
            advance=advance,
        )
        with required_template(checkpoint).reopen() as template:
            yield Renderer(template, self.chat_format, self.tokenizer, options, Rejects(policies))


def open_row_model(
    name: str, settings: Settings, reporter: Reporter, *, preview: int = 0
) -> RowModel:
    """Open a model for its rows.

    Args:
        name: a folder or a hub id; weights may be absent.
        settings: of the run.
        reporter: receives the notes of the media reader.
        preview: pixels of the longer side of the largest preview that is made of media; 0: none.

    Raises:
        QcoreError: as `identify_files`; ``QC-TOKENIZER-001`` the tokenizer cannot be read.
    """
    model = identify_files(name, generation=settings.generation)
    reader = reader_of(model, reporter)
    tokenizer = load_tokenizer(model.checkpoint)
    warnings = tokenizer_findings(model, tokenizer.get_vocab(), normalize_of(tokenizer))
    reporter.lines(map(line, warnings))
    return RowModel(
        name=name,
        model=model,
        chat_format=model.chat_format(),
        tokenizer=tokenizer,
        reader=None if reader is None else reader.measuring(preview),
        settings=settings,
    )
