"""Chat templates and the loss mask (spec section 3: HealthGPT release, llava/conversation.py).

A conversation becomes a list of segments: template text (control tokens), user or assistant text (never control
tokens), images, VQ indices. Segments are tokenised one by one and the mask is built from them, never by searching the
text. Adjacent template pieces are one segment, so that white space between them is tokenised as in the whole string.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

from megatron_hgpt.config import ModelConfig, TemplateName
from megatron_hgpt.errors import ConfigError, SkipSample
from megatron_hgpt.samples import IMAGE_PLACEHOLDER, IMAGE_TOKEN_ID, Sample, Task, Turn
from megatron_hgpt.text.tokenizer import TextTokenizer
from megatron_hgpt.text.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """Template text around system message, questions and answers."""

    system_prompt: str
    system: tuple[str, str]
    """Before and after the system message; ("", "") leaves the message out."""
    user: tuple[str, str]
    assistant_header: str
    end: str
    """Closes an answer and is supervised: one token."""
    between: str
    """After `end` when another turn follows."""
    after_last: str = ""
    """After the last `end`."""
    images_only: bool = False
    """The question's text is dropped, its images stay (LLaVA's `plain`)."""


def _chatml(system_prompt: str) -> ChatTemplate:
    return ChatTemplate(
        system_prompt=system_prompt,
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant_header="<|im_start|>assistant\n",
        end="<|im_end|>",
        between="\n",
        after_last="\n",
    )


TEMPLATES: dict[str, ChatTemplate] = {
    "phi3_instruct": ChatTemplate(
        system_prompt="You are a helpful AI assistant.",
        system=("<|system|>\n", "<|end|>\n"),
        user=("<|user|>\n", "<|end|>\n"),
        assistant_header="<|assistant|>\n",
        end="<|end|>",
        between="\n",
    ),
    "phi4_instruct": ChatTemplate(
        system_prompt="You are a medieval knight and must provide explanations to modern people.",
        system=("<|im_start|>system<|im_sep|>\n", "<|im_end|>\n"),
        user=("<|im_start|>user<|im_sep|>\n", "<|im_end|>\n"),
        assistant_header="<|im_start|>assistant<|im_sep|>\n",
        end="<|im_end|>",
        between="\n",
    ),
    "qwen_2": _chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "smollm2": _chatml("You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    "plain": ChatTemplate(
        system_prompt="",
        system=("", ""),
        user=("", ""),
        assistant_header="",
        end="\n",
        between="",
        images_only=True,
    ),
}
"""Template name -> template. A sequence starts with the tokenizer's BOS where its family has one."""


def get_template(name: str) -> ChatTemplate:
    """The template of that name.

    Raises:
        ConfigError: unknown name.
    """
    if name not in TEMPLATES:
        raise ConfigError(f"template {name!r} is unknown; choose one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def template_of(model: ModelConfig) -> str:
    """The template of a resolved configuration (`model_folders.resolve_model`).

    Raises:
        ConfigError: it is not known.
    """
    if model.template is None:
        raise ConfigError(f"model.template is not known; set it to one of {', '.join(TEMPLATES)}")
    return model.template


def chat_template_of(tokens: Container[str], family: str, description: str) -> TemplateName | None:
    """The chat template that a tokenizer was made for, where its control tokens leave no doubt.

    Args:
        tokens: its entries.
        family: of the backbone: phi3, llama or qwen2.
        description: text of its own configuration, which names the model that it belongs to.
    """
    if "<|assistant|>" in tokens and "<|end|>" in tokens:
        return "phi3_instruct"
    if "<|im_start|>" not in tokens or "<|im_end|>" not in tokens:
        return None
    if "<|im_sep|>" in tokens:
        return "phi4_instruct"
    if family == "qwen2":
        return "qwen_2"
    return "smollm2" if "SmolLM" in description else None  # other models write ChatML with another system message


def resolve_system_prompt(template: str, system_prompt: str | None) -> str:
    """The system message in use: the given one, or the template's own."""
    return get_template(template).system_prompt if system_prompt is None else system_prompt


def end_token_id(tokenizer: TextTokenizer, template: str) -> int:
    """Id of the token that closes an assistant turn.

    Raises:
        ConfigError: the end of the template is not one token of this tokenizer.
    """
    end = get_template(template).end
    ids = tokenizer.encode_template(end)
    if len(ids) != 1:
        raise ConfigError(f"template {template}: {end!r} is {len(ids)} tokens of this tokenizer, not one; check both")
    return ids[0]


class _Builder:
    """Collects tokens and mask; template text waits until a segment of another kind ends it."""

    def __init__(self, tokenizer: TextTokenizer, end_id: int) -> None:
        self._tokenizer, self._end_id = tokenizer, end_id
        self.tokens: list[int] = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self.loss_mask = [False] * len(self.tokens)
        self._pending = ""
        self._pending_closes_answer = False
        self._after_image = False

    def template(self, text: str, *, closes_answer: bool = False) -> None:
        if closes_answer:
            self.flush()
            self._pending_closes_answer = True
        self._pending += text

    def text(self, text: str, *, supervised: bool = False) -> None:
        if text:
            self.flush()
            self.add(self._tokenizer.encode(text, at_start=self._after_image), supervised)

    def image(self) -> None:
        self.flush()
        self.add([IMAGE_TOKEN_ID], supervised=False)
        self._after_image = True

    def add(self, ids: list[int], supervised: bool) -> None:
        self.tokens += ids
        self.loss_mask += [supervised] * len(ids)
        self._after_image = False

    def flush(self) -> None:
        if not self._pending:
            return
        ids = self._tokenizer.encode_template(self._pending)
        closes = self._pending_closes_answer
        if closes and ids[0] != self._end_id:
            raise ConfigError(f"{self._pending!r} does not start with the end token {self._end_id} of its template")
        start = len(self.tokens)
        self.add(ids, supervised=False)
        self.loss_mask[start] = closes
        self._pending, self._pending_closes_answer = "", False


def _header(builder: _Builder, template: ChatTemplate, system_prompt: str | None) -> None:
    before, after = template.system
    if before:
        builder.template(before)
        builder.text(template.system_prompt if system_prompt is None else system_prompt)
        builder.template(after)


def _question(builder: _Builder, template: ChatTemplate, text: str) -> None:
    """A user turn and the header of the answer."""
    builder.template(template.user[0])
    pieces = text.split(IMAGE_PLACEHOLDER)
    for i, piece in enumerate(pieces):
        if i:
            builder.image()
        if not template.images_only:
            builder.text(piece)
    builder.template(template.user[1] + template.assistant_header)


def check_image_count(turns: Sequence[Turn], num_images: int) -> None:
    """Every image needs its placeholder in a user turn; none is added silently.

    Raises:
        SkipSample: ``image_count_mismatch``.
    """
    counts = {role: sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == role) for role in _ROLES}
    if counts["assistant"]:
        raise SkipSample("image_count_mismatch", f"{counts['assistant']} {IMAGE_PLACEHOLDER} in an answer")
    if counts["user"] != num_images:
        detail = f"{counts['user']} {IMAGE_PLACEHOLDER} in the questions for {num_images} images"
        raise SkipSample("image_count_mismatch", f"{detail}; put one {IMAGE_PLACEHOLDER} per image into the text")


_ROLES = ("user", "assistant")


def encode_conversation(
    sample: Sample,
    tokenizer: TextTokenizer,
    template: str,
    vocabulary: Vocabulary,
    system_prompt: str | None = None,
    target_indices: list[int] | None = None,
) -> tuple[list[int], list[bool]]:
    """Token ids and loss mask of a sample; `IMAGE_TOKEN_ID` stands once per image.

    Supervised are every answer and the token that closes it. A generation sample draws in its last answer: the text,
    if any, then `<start_index>`, the indices, `<end_index>`, all supervised.

    Args:
        sample: user and assistant turns in alternation, ending with an answer.
        tokenizer: the backbone's.
        template: a key of `TEMPLATES`.
        vocabulary: where the VQ tokens live.
        system_prompt: system message; None is the template's own.
        target_indices: VQ indices of the image to draw; None takes the sample's.

    Returns:
        tokens [t] and, per token, whether it is supervised.

    Raises:
        SkipSample: ``bad_role_order``, ``image_count_mismatch``, ``empty_answer``, ``bad_indices``.
        ConfigError: unknown template, or one that does not fit the tokenizer.
    """
    chat = get_template(template)
    check_image_count(sample.turns, len(sample.images))
    if not sample.turns or [turn.role for turn in sample.turns] != list(_ROLES) * (len(sample.turns) // 2):
        raise SkipSample("bad_role_order", f"roles are {[turn.role for turn in sample.turns]}")
    builder = _Builder(tokenizer, end_token_id(tokenizer, template))
    _header(builder, chat, system_prompt)
    last = len(sample.turns) - 1
    for i, turn in enumerate(sample.turns):
        if turn.role == "user":
            _question(builder, chat, turn.text)
            continue
        draws = sample.task is Task.GENERATION and i == last
        if not turn.text and not draws:
            raise SkipSample("empty_answer", f"turn {i} is empty")
        builder.text(turn.text, supervised=True)
        if draws:
            builder.flush()
            builder.add(_image_answer(sample, vocabulary, target_indices), supervised=True)
        builder.template(chat.end, closes_answer=True)
        builder.template(chat.after_last if i == last else chat.between)
    builder.flush()
    return builder.tokens, builder.loss_mask


def _image_answer(sample: Sample, vocabulary: Vocabulary, target_indices: list[int] | None) -> list[int]:
    indices = sample.target_indices if target_indices is None else target_indices
    if not indices:
        raise SkipSample("bad_indices", "a generation sample without VQ indices; encode its target image first")
    try:
        return vocabulary.encode_indices(list(indices))
    except ConfigError as error:
        raise SkipSample("bad_indices", str(error)) from error


def encode_prompt(
    question: str,
    task: Task,
    tokenizer: TextTokenizer,
    template: str,
    vocabulary: Vocabulary,
    *,
    system_prompt: str | None = None,
    num_images: int = 0,
) -> list[int]:
    """Token ids of one question up to the point where the model answers: exactly the start of `encode_conversation`.

    Args:
        question: user text with one `<image>` per image.
        task: generation adds `<start_index>` after the assistant header.
        tokenizer, template, vocabulary, system_prompt: as the model was trained with.
        num_images: images that go with the question.

    Raises:
        SkipSample: ``image_count_mismatch``.
        ConfigError: unknown template, or one that does not fit the tokenizer.
    """
    chat = get_template(template)
    check_image_count([Turn(role="user", text=question)], num_images)
    builder = _Builder(tokenizer, end_token_id(tokenizer, template))
    _header(builder, chat, system_prompt)
    _question(builder, chat, question)
    builder.flush()
    if task is Task.GENERATION:
        builder.add([vocabulary.start_id], supervised=False)
    return builder.tokens
