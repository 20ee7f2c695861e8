"""A tiny Llama and its tokenizer, trained from nothing on the CPU.

Shapes: B rows of a batch, S tokens of a row, V vocabulary.
"""

import math
import time
from collections.abc import Iterator

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BATCH_ROWS = 8
ROW_TOKENS = 512  # nearly all fine-tuning conversations are shorter, so none meets a new position
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 50
WEIGHT_DECAY = 0.1
MAX_GRAD_NORM = 1.0
VOCABULARY = 2048
ROLES = ("system", "user", "assistant")

# Every message is <|role|> content <|end|>. These are single tokens that no merge crosses, so a
# rendered conversation is a token prefix of the same conversation one message later.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
    "{% elif message.role in ('system', 'user') %}"
    "{{ '<|' + message.role + '|>' + message.content + eos_token }}"
    "{% else %}"
    "{{ raise_exception('the roles are system, user and assistant, got ' ~ message.role) }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of ``VOCABULARY`` tokens; digits stand alone, as arithmetic likes them."""
    special = ["<|pad|>", "<|begin|>", "<|end|>", *(f"<|{role}|>" for role in ROLES)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        bos_token="<|begin|>",
        eos_token="<|end|>",
        extra_special_tokens=[f"<|{role}|>" for role in ROLES],
        chat_template=CHAT_TEMPLATE,
        # Two spaces before a comma are two spaces: decoding gives the text back exactly.
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> LlamaForCausalLM:
    """About 2.6 M parameters; every side of a linear is a multiple of 64, NF4's block."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Tensor:
    """All documents in one row of token ids, each between a begin and an end token."""
    rows = tokenizer(documents, add_special_tokens=False)["input_ids"]
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    return torch.tensor([token for row in rows for token in (begin, *row, end)])


def train(model: LlamaForCausalLM, tokens: Tensor, *, steps: int, seed: int) -> None:
    """Adam with a cosine to zero on random windows of ``tokens``; changes ``model``, in fp32."""
    optimizer = torch.optim.AdamW(decayed_and_not(model), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step, steps))
    started = time.monotonic()
    for step, window_BS in enumerate(random_windows(tokens, steps=steps, seed=seed), start=1):
        loss = model(input_ids=window_BS, labels=window_BS, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: {loss:.3f} nats, {time.monotonic() - started:.0f} s", flush=True)


def decayed_and_not(model: LlamaForCausalLM) -> list[dict[str, object]]:
    """Matrices decay; norms do not, and the embedding does not, whose rare rows would fade."""
    embedding = model.get_input_embeddings().weight
    decayed = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    kept = [p for p in model.parameters() if p.ndim == 1]
    return [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": [*kept, embedding], "weight_decay": 0.0},
    ]


def warm_cosine(step: int, steps: int) -> float:
    """Factor of the peak learning rate: linear from 0 to 1, then a half cosine to 0."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return 0.5 * (1 + math.cos(math.pi * done))


def random_windows(tokens: Tensor, *, steps: int, seed: int) -> Iterator[Tensor]:
    """``steps`` batches of (B, S) token ids that start anywhere."""
    generator = torch.Generator().manual_seed(seed)
    offsets_S = torch.arange(ROW_TOKENS)
    for _ in range(steps):
        starts_B = torch.randint(len(tokens) - ROW_TOKENS, (BATCH_ROWS,), generator=generator)
        yield tokens[starts_B[:, None] + offsets_S]


@torch.no_grad()
def model_nats(model: LlamaForCausalLM, tokens: Tensor) -> float:
    """Mean nats per token, over windows that each start without a past."""
    total = 0.0
    for start in range(0, len(tokens), ROW_TOKENS):
        window_S = tokens[start : start + ROW_TOKENS]
        logits_SV = model(input_ids=window_S[None], use_cache=False).logits[0, :-1].float()
        total += F.cross_entropy(logits_SV, window_S[1:], reduction="sum").item()
    predicted = len(tokens) - math.ceil(len(tokens) / ROW_TOKENS)
    return total / predicted


def unigram_nats(counted: Tensor, tokens: Tensor) -> float:
    """Mean nats per token under the frequencies of ``counted``, each count plus one."""
    counts_V = torch.bincount(counted, minlength=VOCABULARY).double() + 1
    log_p_V = (counts_V / counts_V.sum()).log()
    return -log_p_V[tokens].mean().item()
