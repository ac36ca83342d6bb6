"""Chat templates of real models, and a real (small) fast tokenizer in a folder."""

from pathlib import Path

# SmolLM2-135M-Instruct's template as its release has it (Apache-2.0).
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The features that templates of other models use: block trimming, loop controls, namespaces, tools, tojson, raise_exception, generation.
ELABORATE = """{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- if tools is not none %}
    {{- 'TOOLS ' + (tools | tojson(indent=2)) }}
{%- endif %}
{%- if documents is not none %}{{- 'DOCUMENTS' }}{%- endif %}
{% for message in messages %}
    {% if message['role'] == 'system' %}
        {% set ns.system = message['content'] %}
        {% continue %}
    {% elif message['role'] == 'tool' %}
        {{ raise_exception('no tools here') }}
    {% endif %}
{{ '<|im_start|>' + message['role'] + ' ' + (message | tojson) + ' ' + message['content'] | trim }}<|im_end|>
    {% if message['role'] == 'assistant' %}{% generation %}{{ 'said: <b>' + message['content'] }}{% endgeneration %}{% endif %}
{% endfor %}
{{ ns.system }}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = ["The passage says that water boils at a hundred degrees.", "Claim: water is wet. SUPPORT CONTRADICT NOT_ENOUGH_INFO", "system user assistant"]


def make_folder(folder: Path, template: str | None, **extra: str) -> Path:
    """A byte-level BPE tokenizer, trained on the spot, in the files of a Hugging Face model folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", **extra})
    if template is not None:
        fast.chat_template = template
    fast.save_pretrained(str(folder))
    return folder
