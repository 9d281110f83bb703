"""Templates in the manner of published ones, of this project's own writing, and what a conversation gives in each."""

# In the manner of DeepSeek-V3: BOS first, system prompts gathered in a namespace, thoughts cut from earlier answers.
DEEPSEEK = r"""
{%- if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(system='', answered=false) %}
{%- for message in messages if message['role'] == 'system' %}
    {%- set ns.system = ns.system + ('\n\n' if ns.system else '') + message['content'] %}
{%- endfor %}
{{- bos_token }}{{ ns.system }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {%- set ns.answered = false %}
        {{- '<｜User｜>' + message['content'] }}
    {%- elif message['role'] == 'assistant' and message['content'] is not none %}
        {%- set content = message['content'] %}
        {%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
        {%- set ns.answered = true %}
        {{- '<｜Assistant｜>' ~ content ~ eos_token }}
    {%- elif message['role'] == 'tool' %}
        {{- '<｜tool▁output｜>' + message['content'] }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and not ns.answered %}{{ '<｜Assistant｜>' }}{% endif %}"""

# In the manner of Qwen3: ChatML, tools as JSON, slices, loop variables, a switch for thinking.
QWEN = """\
{%- macro block(role, content) %}
    {{- '<|im_start|>' + role + '\\n' + content + '<|im_end|>\\n' }}
{%- endmacro %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
    {{- '# Tools\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' }}{{ tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- block('system', messages[0].content) }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == 'user' and message.content is string %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- if not loop.first %}{{ raise_exception('System message must be at the beginning.') }}{% endif %}
        {%- continue %}
    {%- endif %}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last or loop.last %}
            {{- '<think>\\n' + message.reasoning_content|default('', true)|trim + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content.lstrip('\\n') }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' ~ call.name ~ '", "arguments": ' ~ call.arguments|tojson ~ '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- else %}
        {{- block(message.role, message.content) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

# In the manner of Llama 3: header tokens, a date, contents trimmed, blocks on lines of their own.
LLAMA = """\
{% set date = date_string if date_string is defined else strftime_now('%d %b %Y') %}
{% for message in messages %}
    {% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim %}
    {% set content = content + '<|eot_id|>' %}
    {% if loop.index0 == 0 %}
        {% set content = bos_token + 'Today: ' + date + '\\n' + content %}
    {% endif %}
{{ content }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

TALK = [
    {"role": "system", "content": 'Be <brief> & "kind".'},
    {"role": "user", "content": "  héllo\n"},
    {"role": "assistant", "content": "<think>hm</think>Hi!"},
    {"role": "user", "content": "1 + 1?"},
]
TOOLS = [{"name": "add", "parameters": {"a": "int", "é": ["<", "'"]}}]
CALLS = [
    {"role": "user", "content": "add"},
    {
        "role": "assistant",
        "content": "\n\nso",
        "reasoning_content": " sum ",
        "tool_calls": [{"name": "add", "arguments": {"a": 1}}],
    },
    {"role": "tool", "content": "2"},
]
SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}

# (template, messages, what else it is given, text)
CASES = {
    "deepseek": (
        DEEPSEEK,
        TALK,
        {},
        '<|bos|>Be <brief> & "kind".<｜User｜>  héllo\n<｜Assistant｜>Hi!<|eos|><｜User｜>1 + 1?<｜Assistant｜>',
    ),
    "deepseek, answered": (
        DEEPSEEK,
        TALK[:3],
        {},
        '<|bos|>Be <brief> & "kind".<｜User｜>  héllo\n<｜Assistant｜>Hi!<|eos|>',
    ),
    "qwen": (
        QWEN,
        TALK,
        {},
        '<|im_start|>system\nBe <brief> & "kind".<|im_end|>\n<|im_start|>user\n  héllo\n<|im_end|>\n'
        "<|im_start|>assistant\n<think>hm</think>Hi!<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "qwen, not thinking": (
        QWEN,
        TALK[1:2],
        {"enable_thinking": False},
        "<|im_start|>user\n  héllo\n<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "qwen, tools": (
        QWEN,
        CALLS,
        {"tools": TOOLS, "add_generation_prompt": False},
        '<|im_start|>system\n# Tools\n<tools>\n{"name": "add", "parameters": {"a": "int", "é": ["<", "\'"]}}\n</tools><|im_end|>\n'
        "<|im_start|>user\nadd<|im_end|>\n<|im_start|>assistant\n<think>\nsum\n</think>\n\nso\n<tool_call>\n"
        '{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n<|im_start|>tool\n2<|im_end|>\n',
    ),
    "llama": (
        LLAMA,
        TALK[1:],
        {"date_string": "1 May 2024"},
        "<|bos|>Today: 1 May 2024\n<|start_header_id|>user<|end_header_id|>\n\nhéllo<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<think>hm</think>Hi!<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n1 + 1?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
}
