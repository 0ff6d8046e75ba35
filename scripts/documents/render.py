"""Rules ``render_*``: documents from their templates and the JSON that other rules wrote.

A template holds words, this module turns values into text, and every figure comes out of a file: the context
of a template is the content of the rule's inputs, and what :func:`derive` computes from it. A name that the
JSON does not have is an error, never a blank. Text of models, requests and commands is data: whatever a
template prints is escaped, unless a filter of this module made it. Beside the documents stands a list of each number
in them with the files and keys that it came from (``scripts/documents/traced_values.py``).
"""

import json
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dryfit.cards.sentences import said_of
from dryfit.common.errors import UserError
from dryfit.common.files import read_report, write_report, write_text
from dryfit.common.terminal import log
from dryfit.data import data_path
from dryfit.scenario.description import beyond_plain_lora
from scripts.common.job import job
from scripts.common.reports import carried_by, gather
from scripts.documents.context import derive
from scripts.documents.traced_values import (
    MARKS,
    NUMBER,
    collect,
    count_of,
    mark_sources,
    plain,
    sourced,
)
from scripts.documents.validate import check_document

SHOWN_CHARACTERS = 240  # of one request or answer

# Characters with a meaning inside a line of Markdown, and the three that open a link without any markup.
_MARKDOWN = re.compile(r"([\\`*_\[\]|~$])")
_LINKS = {"://": "&#58;//", "www.": "www&#46;", "@": "&#64;"}
_BRACES = {"{": "&#123;", "}": "&#125;"}  # so that none is taken for a place that was not filled in
# What is no text of a page: its numbers are colours, sizes, names of tags.
_TAGS = re.compile(r"<style>.*?</style>|<[^>]*>|&#?\w+;", re.DOTALL)


def visible(text: str) -> str:
    """The text with what can't be seen (control, format, surrogate characters) written as escapes.

    An escape sequence or a right-to-left override could make a command look like another one.
    """
    if text.isprintable():
        return text
    shown = []
    for character in text:
        if (
            character in "\n\t"
            or (unicodedata.category(character)[0] not in "C" and character not in "\u2028\u2029")
            or character in MARKS
        ):
            shown.append(character)
        else:
            shown.append(f"\\u{{{ord(character):x}}}")
    return "".join(shown)


def shorten(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """At most ``limit`` characters, with a mark where something was left out."""
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def escape_markdown(text: str) -> str:
    """The text as it stands, on one line, in Markdown: no markup, no HTML, no links out of it."""
    text = " ".join(visible(text).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for meant, entity in (_LINKS | _BRACES).items():
        text = text.replace(meant, entity)
    return _MARKDOWN.sub(r"\\\1", text)


def code_span(text: object) -> str:
    """The text as a code span: fenced by more backticks than it holds, line breaks shown as a sign."""
    line = visible(str(text)).replace("\n", " ⏎ ").replace("\t", " ")
    if not line.strip():
        return "(nothing)"
    bare = plain(line)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", bare)), default=0))
    pad = " " if bare[0] in "` " or bare[-1] in "` " else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def code_cell(text: object) -> str:
    """A code span inside a table, where a bar would end the cell even between backticks."""
    return code_span(text).replace("|", "\\|")


def quoted(text: str) -> str:
    """The text as a string of Python, which JSON's is for text without surrogates."""
    return visible(json.dumps(text, ensure_ascii=False))


def code_block(text: str, language: str = "") -> str:
    """The text as a fenced block, its fence longer than any run of backticks in it."""
    text = visible(text).rstrip("\n")
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


# --- numbers as text -----------------------------------------------------------------------


def gigabytes(size: float | None, digits: int = 2) -> str:
    """Bytes as GB of 10^9 bytes, in which people quote the rule of thumb; everything else is said in GiB."""
    return "not measured" if size is None else f"{size / 1e9:,.{digits}f} GB"


def short_gigabytes(size: float) -> str:
    """Bytes as a number of GB of 10^9 bytes with no more digits than it has: ``28``, ``0.25``."""
    quoted = round(size / 1e9, 2)
    digits = 0 if quoted == int(quoted) else 2
    return f"{size / 1e9:,.{digits}f}"


def gibibytes(size: float | None, digits: int = 2) -> str:
    """Bytes as GiB of 2^30 bytes."""
    return "not measured" if size is None else f"{size / 2**30:,.{digits}f} GiB"


def memory_size(size: float | None) -> str:
    """Bytes in the unit that fits: bytes, KiB, MiB or GiB."""
    if size is None:
        return "not measured"
    for factor, unit, digits in ((2**30, "GiB", 2), (2**20, "MiB", 1), (2**10, "KiB", 1)):
        if abs(size) >= factor / 2:
            return f"{size / factor:,.{digits}f} {unit}"
    return f"{size:,.0f} B"


def number(value: float | None, digits: int = 0) -> str:
    return "not measured" if value is None else f"{value:,.{digits}f}"


def counted(count: int, noun: str) -> str:
    """A number of things: ``1 row``, ``2,000 rows``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def none_or_number(count: int) -> str:
    """A number of things that were named before; ``none`` for 0."""
    return f"{count:,}" if count else mark_sources("none", count)


def setting(value: object) -> str:
    """A setting as the configuration would hold it: the shortest text that is the same number."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {setting(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(setting(item) for item in value)
    return "none" if value is None else f"{value}"


def more_of_an_adapter(lora: Mapping[str, Any]) -> str:
    """What an adapter has beside its rank, its alpha and its layers, to go on behind these; "" for nothing."""
    return "".join(f", {words}" for words in beyond_plain_lora(lora))


def percent(share: float | None, digits: int = 1) -> str:
    return "not measured" if share is None else f"{100 * share:.{digits}f} %"


def signed(value: float | None, digits: int = 3) -> str:
    return "not measured" if value is None else _minus(f"{value:+.{digits}f}")


def points(share: float | None, digits: int = 1) -> str:
    """A difference of two shares, with its sign, in percentage points."""
    return "not measured" if share is None else _minus(f"{100 * share:+.{digits}f} points")


def signed_percent(share: float | None, digits: int = 2) -> str:
    """A relative difference with its sign, as per cent; what rounds to zero has none."""
    if share is None:
        return "not measured"
    sign = "+" if round(100 * share, digits) else ""
    return _minus(f"{100 * share if sign else abs(share):{sign},.{digits}f} %")


def deviation(share: float | None, digits: int = 2) -> str:
    """A relative difference in words: ``18.9 % too low``."""
    if share is None:
        return "not measured"
    if share and not round(100 * share, digits):
        digits = 2  # what rounds to zero is shown closer
    word = ("too high" if share > 0 else "too low") if round(100 * share, digits) else "off"
    return f"{100 * abs(share):,.{digits}f} % {word}"


def signed_size(size: float | None) -> str:
    return "not measured" if size is None else ("+" if size >= 0 else "−") + memory_size(abs(size))


def tiny_share(share: float) -> str:
    """A relative difference near the last digit of a float."""
    return f"{share:.0e}"


def _minus(text: str) -> str:
    return text.replace("-", "−")


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "not measured"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


# --- rendering -----------------------------------------------------------------------------


def _finalize(value: Any, html: bool) -> Any:
    """What Jinja does with each printed value before it is written."""
    from markupsafe import Markup, escape

    if value is None or isinstance(value, dict | list):
        raise TypeError(
            f"{value!r} can't be printed; choose a field of it, or say what its absence means"
        )
    if not isinstance(value, str):
        return Markup(str(value))
    if isinstance(value, Markup):
        return value
    return Markup(mark_sources(escape(visible(value)) if html else escape_markdown(value), value))


def _sourced_wording(environment: Any, html: bool) -> None:
    """Let the numbers in a template's own words know their line, as those of the JSON know their key."""
    from jinja2.ext import Extension
    from jinja2.lexer import Token

    class SourcedWording(Extension):
        def filter_stream(self, stream: Any) -> Any:
            for token in stream:
                words = token.type == "data" and not stream.filename.endswith(".css")
                yield self.with_sources(token, stream.filename) if words else token

        def with_sources(self, token: Any, filename: str) -> Any:
            def mark(found: re.Match[str]) -> str:
                if found["number"] is None:
                    return found[0]
                line = token.lineno + token.value.count("\n", 0, found.start())
                return mark_sources(found[0], sourced(found[0], filename, f"line {line}"))

            return Token(token.lineno, "data", pattern.sub(mark, token.value))

    pattern = re.compile(
        f"{_TAGS.pattern if html else '(?!)'}|(?P<number>{NUMBER.pattern})", re.DOTALL
    )
    environment.add_extension(SourcedWording)


@cache
def environment(folder: Path, html: bool) -> Any:
    """A Jinja environment in which an unknown name is an error and every text is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    made = Environment(
        loader=FileSystemLoader([folder, data_path("site")]),  # the calculator's drawing.css
        undefined=StrictUndefined,
        autoescape=True,
        finalize=partial(_finalize, html=html),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    _sourced_wording(made, html)
    texts = (
        gigabytes,
        gibibytes,
        memory_size,
        number,
        percent,
        points,
        signed,
        signed_percent,
        deviation,
        short_gigabytes,
        signed_size,
        duration,
    )
    for function in (
        *texts,
        counted,
        none_or_number,
        tiny_share,
    ):  # digits and words of templates: nothing in them to escape
        made.filters[function.__name__] = _marked(function)
    made.filters["href"] = _marked(href)
    made.filters["setting"] = setting
    made.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    made.filters["shorten"] = shorten
    made.filters["said"] = said_of
    made.filters["length"] = count_of
    made.filters["beyond_plain_lora"] = more_of_an_adapter
    if html:
        made.filters["code"] = _marked(
            lambda text: Markup("<code>{}</code>").format(visible(text) or "(nothing)")
        )
    else:
        made.filters["code"] = _marked(code_span)
        made.filters["codecell"] = _marked(code_cell)
        made.filters["quoted"] = _marked(quoted)
        made.filters["codeblock"] = _marked(code_block)
    return made


def _marked(function: Any) -> Any:
    from markupsafe import Markup

    @wraps(function)
    def filtered(value: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(
            value, str
        ):  # escapes look at the bare text; its marks go around what they made of it
            return Markup(mark_sources(function(str(value), *args, **kwargs), value))
        return Markup(function(value, *args, **kwargs))

    return filtered


def render(template: Path, context: Mapping[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """Fill in a template.

    Returns
    -------
    str
        The document.
    list of dict
        Its numbers with their sources, as :func:`scripts.documents.traced_values.collect` lists them.

    Raises
    ------
    UserError
        Naming the template's line, when it asks for what the JSON does not have.
    """
    from jinja2 import TemplateError

    html = ".html" in template.name
    try:
        text = environment(template.parent, html).get_template(template.name).render(**context)
    except (TemplateError, TypeError) as error:
        raise UserError(
            f"The template uses an undefined name: {error}",
            where=_template_line(error, template),
            allowed="names that the JSON inputs of the rule have",
        ) from error
    if html:
        return collect(text, _TAGS)
    # Blocks that printed nothing leave blank lines behind; more than one in a row means nothing in Markdown.
    return collect(
        _outside_fences(text, lambda part: re.sub(r"\n{3,}", "\n\n", part)).strip("\n") + "\n"
    )


def _outside_fences(text: str, change: Any) -> str:
    """Apply ``change`` to what does not stand in a fenced block."""
    parts = re.split(r"(^(`{3,})[^\n]*\n.*?^\2$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(
        part if index % 3 == 1 else change(part)
        for index, part in enumerate(parts)
        if index % 3 != 2
    )


def _template_line(error: BaseException, template: Path) -> str:
    """The innermost line of a template on the error's way."""
    place, trace = str(template), error.__traceback__
    while trace:
        file = trace.tb_frame.f_code.co_filename
        if file.endswith(".j2"):
            place = f"{file}, line {trace.tb_lineno}"
        trace = trace.tb_next
    return place


def href(path: str) -> str:
    """A path as the target of a link: whatever has a meaning in Markdown, HTML or an address is encoded."""
    return quote(path, safe="/._-")


def link(path: str, document: Path) -> str:
    """A file's path as seen from the folder of the document."""
    return Path(os.path.relpath(path, document.parent)).as_posix()


def data_uri(path: str) -> str:
    """A figure as part of an HTML page, which then is complete in itself."""
    import base64

    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()


def write_documents(
    templates: Sequence[str],
    context: Mapping[str, Any],
    figures: Sequence[str],
    outputs: Sequence[str],
    others: Sequence[str] = (),
) -> None:
    """Render, check, write: where a document is not valid, none is written.

    Parameters
    ----------
    templates
        One for each document, of its name and ``.j2``.
    context
        What they print; ``figures`` are added, as links, or as a part of a page.
    outputs
        The documents, and last the list of their numbers: by document, see :func:`render`.
    others
        Documents that other jobs have made, and their lists, to be taken over.
    """
    template_of = {Path(path).name.removesuffix(".j2"): Path(path) for path in templates}
    numbers: dict[str, Any] = {}
    for path in others:
        if path.endswith(".json"):
            numbers |= read_report(path)["documents"]
    *documents, listed = map(Path, outputs)
    texts = {}
    for document in documents:
        shown = data_uri if document.suffix == ".html" else partial(link, document=document)
        shown_figures = {Path(path).stem: shown(path) for path in figures}
        text, numbers[str(document)] = render(
            template_of[document.name], {**context, "figures": shown_figures}
        )
        check_document(text, document)
        texts[document] = text
    for document, text in texts.items():
        write_text(document, text)
        log.info(
            "%s: %d words, %d numbers", document, len(text.split()), len(numbers[str(document)])
        )
    # Sealed here too: figures, and documents that lie elsewhere than their list.
    beside = [*figures, *(path for path in others if not path.endswith(".json"))]
    write_report(listed, {"documents": numbers}, *documents, *beside)
    for name, found in numbers.items():
        if lost := [entry for entry in found if not entry["from"]]:
            log.warning(
                "%s, line %d: no source recorded for %s", name, lost[0]["line"], lost[0]["shown"]
            )


def main(inputs: Mapping[str, Any], settings: Mapping[str, Any], outputs: Sequence[str]) -> None:
    inputs = dict(inputs)
    for name in ("macros", "styles", "unread"):  # templates include the first two
        inputs.pop(name, None)
    made_of = {name: list(inputs.pop(name, [])) for name in ("templates", "figures", "others")}
    paths, contents = carried_by(report) if (report := inputs.pop("collected", None)) else ({}, {})
    inputs, contents = paths | inputs, contents | gather(inputs)
    files = {name: with_sources(content, inputs[name]) for name, content in contents.items()}
    write_documents(context=derive(files, from_rule(settings), inputs), outputs=outputs, **made_of)


def with_sources(content: Any, path: str | Sequence[str]) -> Any:
    """The content of a file, or of each of several, with its sources."""
    if isinstance(path, str):
        return sourced(content, path)
    return [sourced(*one) for one in zip(content, path, strict=True)]


def from_rule(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The rule's params as values that know that they came from there, and the configuration from itself."""
    known = sourced(
        {name: value for name, value in settings.items() if name != "configuration"},
        "rules/documents.smk",
    )
    if "configuration" in settings:
        known["configuration"] = sourced(settings["configuration"], "configuration")
    return known


if __name__ == "__main__":
    with job(snakemake):
        main(dict(snakemake.input.items()), snakemake.params.settings, list(snakemake.output))
