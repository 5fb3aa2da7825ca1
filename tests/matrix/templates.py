"""Chat templates of the kinds that published models have, in words of our own."""

from __future__ import annotations

_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate: user, assistant, user …') }}{% endif %}"
)
_SYSTEM_APART = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = none %}"
    "{% set turns = messages %}{% endif %}"
)

TEMPLATES: dict[str, str] = {
    "chatml": _CHATML,
    "llama-2": _SYSTEM_APART + "{% for m in turns %}" + _ALTERNATE + "{% if m.role == 'user' %}"
    "{{ bos_token }}[INST] {% if loop.first and system %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n"
    "{% endif %}{{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}",
    "llama-3": "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    "{% endif %}",
    "llama-3.1": "{{ bos_token }}{% if date_string is not defined %}"
    "{% set date_string = '26 Jul 2024' %}{% endif %}" + _SYSTEM_APART + "<|start_header_id|>system"
    "<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: {{ date_string }}\n\n"
    "{{ system or '' }}<|eot_id|>{% for m in turns %}<|start_header_id|>{{ m.role }}"
    "<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "llama-3.2": "{{ bos_token }}{% if date_string is not defined %}"
    "{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}\n\n<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "mistral-v1": "{{ bos_token }}{% for m in messages %}"
    + _ALTERNATE
    + "{% if m.role == 'user' %}"
    "[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}{{ eos_token }} {% endif %}"
    "{% endfor %}",
    "mistral-v3": "{{ bos_token }}"
    + _SYSTEM_APART
    + "{% for m in turns %}{% if m.role == 'user' %}"
    "[INST] {% if loop.last and system %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}",
    "mistral-tekken": "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]{% elif m.role == 'user' %}"
    "[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "gemma": "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    + _ALTERNATE
    + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "gemma-3": "{{ bos_token }}" + _SYSTEM_APART + "{% for m in turns %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{% if loop.first and system %}"
    "{{ system if system is string else system[0].text }}\n\n{% endif %}"
    "{% if m.content is string %}{{ m.content | trim }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'text' %}{{ c.text | trim }}{% endif %}{% endfor %}{% endif %}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "phi-3": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
    "phi-4": "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
    "qwen-2": "{% if messages[0].role != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant<|im_end|>\n{% endif %}" + _CHATML,
    "qwen-3": "{% for m in messages %}{% set content = m.content %}{% set thought = '' %}"
    "{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}",
    "qwen-3-thinking": "{% for m in messages %}{% set content = m.content %}{% set thought = '' %}"
    "{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    "qwq": "{% for m in messages %}{% set content = m.content %}{% if m.role == 'assistant' %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    "deepseek-r1": "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ m.content }}{% elif m.role == 'user' %}<｜User｜>{{ m.content }}{% else %}<｜Assistant｜>"
    "{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}",
    "zephyr": "{% for m in messages %}\n{% if m.role == 'user' %}\n"
    "{{ '<|user|>\n' + m.content + eos_token }}\n{% elif m.role == 'system' %}\n"
    "{{ '<|system|>\n' + m.content + eos_token }}\n{% else %}\n"
    "{{ '<|assistant|>\n' + m.content + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}",
    "vicuna": "{{ bos_token }}A chat between a curious user and an assistant. "
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% else %}"
    "ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "falcon": "{% for m in messages %}{{ '' if loop.first else '\n' }}"
    "{{ m.role | capitalize }}: {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nAssistant:' }}{% endif %}",
    "command-r": "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>"
    "{{ '<|CHATBOT_TOKEN|>' if m.role == 'assistant' else '<|USER_TOKEN|>' if m.role == 'user' "
    "else '<|SYSTEM_TOKEN|>' }}{{ m.content.strip() }}<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}",
    "granite": "{% if messages[0].role != 'system' %}<|start_of_role|>system<|end_of_role|>"
    "Today's Date: {{ strftime_now('%B %d, %Y') }}.\nYou are helpful.{{ eos_token }}\n{% endif %}"
    "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}"
    "{{ eos_token }}\n{% if loop.last and add_generation_prompt %}"
    "<|start_of_role|>assistant<|end_of_role|>{% endif %}{% endfor %}",
    "olmo": "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token if loop.last else '\n' }}{% else %}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "gpt-oss": "<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}\n\n"
    "Reasoning: medium<|end|>{% for m in messages %}{% if m.role == 'assistant' %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% else %}"
    "<|start|>{{ 'developer' if m.role == 'system' else m.role }}<|message|>{{ m.content }}<|end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
    "smollm-3": "<|im_start|>system\nToday Date: {{ strftime_now('%d %B %Y') }}\n"
    "Reasoning Mode: /no_think\n<|im_end|>\n{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<think>\n\n</think>\n{{ m.content.lstrip('\\n') }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n{% endif %}",
    "yi": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "internlm": "{{ bos_token }}" + _CHATML,
    "starchat": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}",
    "parts": _CHATML.replace(
        "{{ m.content }}",
        "{% for c in m.content %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}"
        "{% endfor %}",
    ),
}
"""Templates that hedgerow trains with, by the models whose structure they have."""

DATED = ("llama-3.2", "granite", "gpt-oss", "smollm-3")
"""Those that read the clock."""

REFUSED: dict[str, tuple[str, str]] = {
    "fails": ("{{ raise_exception('only system') }}", r"fails \(only system\)"),
    "no such name": ("{{ messages[0].content.shout() }}", "fails"),
    "not Jinja": ("{% for m in messages %}", "fails"),
    "escapes": (_CHATML.replace("m.content", "m.content | e"), "alters what the user says"),
    "JSON": (_CHATML.replace("m.content", "m.content | tojson"), "alters what the user says"),
    "upper case": (_CHATML.replace("m.content", "m.content | upper"), "leaves out what the user"),
    "cuts": (_CHATML.replace("m.content", "m.content[:1000]"), "alters what the user says"),
    "one line": (
        _CHATML.replace("m.content", "m.content.split() | join(' ')"),
        "alters what the user says",
    ),
    "no answer": (
        _CHATML.replace("{{ m.content }}", "{% if m.role == 'user' %}{{ m.content }}{% endif %}"),
        "leaves out what the assistant says",
    ),
    "no question": (
        _CHATML.replace("{{ m.content }}", "{{ m.content if m.role != 'user' }}"),
        "leaves out what the user says",
    ),
    "twice": (_CHATML.replace("m.content", "m.content * 2"), "more than once"),
    "backwards": (
        _CHATML.replace("in messages", "in messages | reverse"),
        "leaves out|alters|order",
    ),
    "at random": ("{{ range(100000) | random }}" + _CHATML, "something else each time"),
    "filler": ("{{ lipsum() }}" + _CHATML, "something else each time"),
}
"""Templates that hedgerow cannot train with, each with what it says."""
