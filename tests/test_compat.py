"""Scripts in the style of Unsloth's notebooks, run unchanged but for the paths, which they take from their arguments."""

import json
import subprocess
import sys
import textwrap

import pytest
import tiny
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier.compat import unsloth as compat

SFT = """
    import sys
    from unsloth import FastLanguageModel
    import torch
    max_seq_length = 128
    dtype = None
    load_in_4bit = True

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name = sys.argv[1],
        max_seq_length = max_seq_length,
        dtype = dtype,
        load_in_4bit = load_in_4bit,
        # token = "hf_...",
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r = 8,
        target_modules = ["q_proj", "k_proj", "v_proj", "o_proj",
                          "gate_proj", "up_proj", "down_proj",],
        lora_alpha = 16,
        lora_dropout = 0,
        bias = "none",
        use_gradient_checkpointing = "unsloth",
        random_state = 3407,
        use_rslora = False,
        loftq_config = None,
    )

    from unsloth.chat_templates import get_chat_template
    tokenizer = get_chat_template(
        tokenizer,
        chat_template = "chatml",
    )
    def formatting_prompts_func(examples):
        convos = examples["conversations"]
        texts = [tokenizer.apply_chat_template(convo, tokenize = False, add_generation_prompt = False) for convo in convos]
        return { "text" : texts, }

    from datasets import load_dataset
    dataset = load_dataset("json", data_files = sys.argv[2], split = "train")
    from unsloth.chat_templates import standardize_sharegpt
    dataset = standardize_sharegpt(dataset)
    dataset = dataset.map(formatting_prompts_func, batched = True,)
    assert dataset[0]["conversations"][0] == {"role": "user", "content": "What is 0 plus 1?"}

    from trl import SFTTrainer
    from transformers import TrainingArguments, DataCollatorForSeq2Seq
    from unsloth import is_bfloat16_supported
    trainer = SFTTrainer(
        model = model,
        tokenizer = tokenizer,
        train_dataset = dataset,
        dataset_text_field = "text",
        max_seq_length = max_seq_length,
        data_collator = DataCollatorForSeq2Seq(tokenizer = tokenizer),
        dataset_num_proc = 2,
        packing = False, # Can make training 5x faster for short sequences.
        args = TrainingArguments(
            per_device_train_batch_size = 2,
            gradient_accumulation_steps = 2,
            warmup_steps = 1,
            # num_train_epochs = 1, # Set this for 1 full training run.
            max_steps = 3,
            learning_rate = 2e-2,
            fp16 = not is_bfloat16_supported(),
            bf16 = is_bfloat16_supported(),
            logging_steps = 1,
            optim = "adamw_8bit",
            weight_decay = 0.01,
            lr_scheduler_type = "linear",
            seed = 3407,
            output_dir = sys.argv[3] + "/outputs",
            overwrite_output_dir = True,
            report_to = "none", # Use this for WandB etc
        ),
    )
    from unsloth.chat_templates import train_on_responses_only
    trainer = train_on_responses_only(
        trainer,
        instruction_part = "<|im_start|>user\\n",
        response_part = "<|im_start|>assistant\\n",
    )
    space = tokenizer(" ", add_special_tokens = False).input_ids[0]
    shown = tokenizer.decode([space if x == -100 else x for x in trainer.train_dataset[0]["labels"]])
    assert shown.strip() == "It is 1.<|im_end|>", shown

    #@title Show current memory stats
    gpu_stats = torch.cuda.get_device_properties(0)
    start_gpu_memory = round(torch.cuda.max_memory_reserved() / 1024 / 1024 / 1024, 3)
    max_memory = round(gpu_stats.total_memory / 1024 / 1024 / 1024, 3)
    print(f"GPU = {gpu_stats.name}. Max memory = {max_memory} GB.")

    trainer_stats = trainer.train()
    print(f"{trainer_stats.metrics['train_runtime']} seconds used for training.")

    FastLanguageModel.for_inference(model) # Enable native 2x faster inference
    messages = [
        {"role": "user", "content": "What is 1 plus 1?"},
    ]
    inputs = tokenizer.apply_chat_template(
        messages,
        tokenize = True,
        add_generation_prompt = True, # Must add for generation
        return_tensors = "pt",
    ).to("cuda")
    outputs = model.generate(input_ids = inputs, max_new_tokens = 8, use_cache = True,
                             temperature = 1.5, min_p = 0.1)
    assert outputs.shape[1] > inputs.shape[1]
    tokenizer.batch_decode(outputs)

    from transformers import TextStreamer
    text_streamer = TextStreamer(tokenizer, skip_prompt = True)
    _ = model.generate(input_ids = inputs, streamer = text_streamer, max_new_tokens = 8,
                       use_cache = True, temperature = 1.5, min_p = 0.1)

    model.save_pretrained(sys.argv[3] + "/lora_model")  # Local saving
    tokenizer.save_pretrained(sys.argv[3] + "/lora_model")
    if True:
        from unsloth import FastLanguageModel
        again, tokenizer = FastLanguageModel.from_pretrained(
            model_name = sys.argv[3] + "/lora_model", # YOUR MODEL YOU USED FOR TRAINING
            max_seq_length = max_seq_length,
            dtype = dtype,
            load_in_4bit = load_in_4bit,
        )
        FastLanguageModel.for_inference(again)
        greedy = dict(max_new_tokens = 8, do_sample = False)
        assert torch.equal(model.generate(input_ids = inputs, **greedy), again.generate(input_ids = inputs, **greedy))

    if True: model.save_pretrained_merged(sys.argv[3] + "/model", tokenizer, maximum_memory_usage = 0.5,)
    if False: model.push_to_hub_merged("hf/model", tokenizer, save_method = "merged_16bit", token = "")
    if True: model.save_pretrained_merged(sys.argv[3] + "/lora", tokenizer, save_method = "lora",)
    if True: model.save_pretrained_gguf(sys.argv[3] + "/gguf", tokenizer, quantization_method = ["q8_0", "f16"])
    print(tokenizer._ollama_modelfile)
    print("DONE", __file__)
"""
CONTINUED_PRETRAINING = """
    import sys
    from unsloth import FastLanguageModel, UnslothTrainer, UnslothTrainingArguments, is_bfloat16_supported, unsloth_train
    model, tokenizer = FastLanguageModel.from_pretrained(sys.argv[1], max_seq_length = 64, load_in_4bit = True)
    model = FastLanguageModel.get_peft_model(
        model,
        r = 8, # Choose any number > 0 ! Suggested 8, 16, 32, 64, 128
        target_modules = ["q_proj", "k_proj", "v_proj", "o_proj",
                          "gate_proj", "up_proj", "down_proj",
                          "embed_tokens", "lm_head",], # Add for continual pretraining
        lora_alpha = 32,
        lora_dropout = 0, # Supports any, but = 0 is optimized
        bias = "none",    # Supports any, but = "none" is optimized
        use_gradient_checkpointing = "unsloth", # True or "unsloth" for very long context
        random_state = 3407,
        use_rslora = True,  # We support rank stabilized LoRA
        loftq_config = None, # And LoftQ
        max_seq_length = 64,
    )
    from datasets import Dataset
    EOS_TOKEN = tokenizer.eos_token # Must add EOS_TOKEN
    def formatting_prompts_func(examples):
        return { "text" : [example + EOS_TOKEN for example in examples["text"]] }
    dataset = Dataset.from_dict({"text": [f"Chapter {n}. It was a dark and stormy night." for n in range(8)]})
    dataset = dataset.map(formatting_prompts_func, batched = True,)
    before = model.get_input_embeddings().weight.clone()
    trainer = UnslothTrainer(
        model = model,
        tokenizer = tokenizer,
        train_dataset = dataset,
        dataset_text_field = "text",
        max_seq_length = 64,
        dataset_num_proc = 8,
        args = UnslothTrainingArguments(
            per_device_train_batch_size = 2,
            gradient_accumulation_steps = 2,
            warmup_ratio = 0.1,
            num_train_epochs = 1,
            learning_rate = 5e-3,
            embedding_learning_rate = 5e-4,
            fp16 = not is_bfloat16_supported(),
            bf16 = is_bfloat16_supported(),
            logging_steps = 1,
            optim = "adamw_8bit",
            weight_decay = 0.00,
            lr_scheduler_type = "cosine",
            seed = 3407,
            output_dir = sys.argv[2],
            report_to = "none",
        ),
    )
    trainer_stats = unsloth_train(trainer)
    table = model.get_input_embeddings().weight
    rates = {group["initial_lr"] for group in trainer.optimizer.param_groups if any(p is table for p in group["params"])}
    assert rates == {5e-4}, rates
    assert not (table == before).all()
    FastLanguageModel.for_inference(model)
    inputs = tokenizer(["Chapter 3."], return_tensors = "pt").to("cuda")
    outputs = model.generate(**inputs, max_new_tokens = 4, use_cache = True)
    model.save_pretrained_merged(sys.argv[2] + "/merged", tokenizer)
    print("DONE", trainer.state.global_step)
"""
GRPO = """
    import sys
    from unsloth import FastLanguageModel, PatchFastRL
    PatchFastRL("GRPO", FastLanguageModel)
    from unsloth import is_bfloat16_supported
    import torch
    max_seq_length = 96
    lora_rank = 8
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name = sys.argv[1],
        max_seq_length = max_seq_length,
        load_in_4bit = True, # False for LoRA 16bit
        fast_inference = True, # Enable vLLM fast inference
        max_lora_rank = lora_rank,
        gpu_memory_utilization = 0.6, # Reduce if out of memory
        disable_log_stats = True,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r = lora_rank,
        target_modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        lora_alpha = lora_rank,
        use_gradient_checkpointing = "unsloth",
        random_state = 3407,
    )
    from datasets import Dataset
    dataset = Dataset.from_list([
        {"prompt": [{"role": "system", "content": "Answer."}, {"role": "user", "content": f"What is {n}?"}], "answer": str(n)}
        for n in range(8)
    ])
    def correctness_reward_func(prompts, completions, answer, **kwargs) -> list[float]:
        responses = [completion[0]["content"] for completion in completions]
        return [2.0 if a in r else 0.0 for r, a in zip(responses, answer)]
    def length_reward_func(completions, **kwargs) -> list[float]:
        return [len(completion[0]["content"]) / 100 for completion in completions]

    max_prompt_length = 64
    from vllm import SamplingParams
    vllm_sampling_params = SamplingParams(
        min_p = 0.1,
        top_p = 1.0,
        top_k = -1,
        seed = 3407,
        stop = [tokenizer.eos_token],
        include_stop_str_in_output = True,
    )
    from trl import GRPOConfig, GRPOTrainer
    training_args = GRPOConfig(
        use_vllm = True, # use vLLM for fast inference!
        vllm_sampling_params = vllm_sampling_params,
        learning_rate = 5e-3,
        adam_beta1 = 0.9,
        adam_beta2 = 0.99,
        weight_decay = 0.1,
        warmup_ratio = 0.1,
        lr_scheduler_type = "cosine",
        optim = "paged_adamw_8bit",
        logging_steps = 1,
        bf16 = is_bfloat16_supported(),
        fp16 = not is_bfloat16_supported(),
        per_device_train_batch_size = 1,
        gradient_accumulation_steps = 1, # Increase to 4 for smoother training
        num_generations = 4, # Decrease if out of memory
        max_prompt_length = max_prompt_length,
        max_completion_length = 8,
        # num_train_epochs = 1, # Set to 1 for a full training run
        max_steps = 2,
        save_steps = 2,
        max_grad_norm = 0.1,
        report_to = "none", # Can use Weights & Biases
        output_dir = sys.argv[2] + "/outputs",
    )
    trainer = GRPOTrainer(
        model = model,
        processing_class = tokenizer,
        reward_funcs = [
            correctness_reward_func,
            length_reward_func,
        ],
        args = training_args,
        train_dataset = dataset,
    )
    trainer.train()
    assert trainer.args.per_device_train_batch_size == 4 and trainer.args.min_p == 0.1

    text = tokenizer.apply_chat_template([
        {"role" : "user", "content" : "How many r's are in strawberry?"},
    ], tokenize = False, add_generation_prompt = True)
    sampling_params = SamplingParams(
        temperature = 0.8,
        top_p = 0.95,
        max_tokens = 8,
    )
    output = model.fast_generate(
        [text],
        sampling_params = sampling_params,
        lora_request = None,
    )[0].outputs[0].text
    model.save_lora(sys.argv[2] + "/grpo_saved_lora")
    output = model.fast_generate(
        text,
        sampling_params = sampling_params,
        lora_request = model.load_lora(sys.argv[2] + "/grpo_saved_lora"),
    )[0].outputs[0].text
    assert isinstance(output, str)
    print("DONE", [log["reward"] for log in trainer.state.log_history if "reward" in log])
"""
VISION = """
    import sys
    from unsloth import FastVisionModel # FastLanguageModel for LLMs
    import torch
    model, tokenizer = FastVisionModel.from_pretrained(
        sys.argv[1],
        load_in_4bit = True, # Use 4bit to reduce memory use. False for 16bit LoRA.
        use_gradient_checkpointing = "unsloth", # True or "unsloth" for long context
    )
    model = FastVisionModel.get_peft_model(
        model,
        finetune_vision_layers     = True, # False if not finetuning vision layers
        finetune_language_layers   = True, # False if not finetuning language layers
        finetune_attention_modules = True, # False if not finetuning attention layers
        finetune_mlp_modules       = True, # False if not finetuning MLP layers
        r = 8,
        lora_alpha = 8,
        lora_dropout = 0,
        bias = "none",
        random_state = 3407,
        use_rslora = False,
        loftq_config = None,
        # target_modules = "all-linear", # Optional now! Can specify a list if needed
    )
    from PIL import Image
    dataset = [{"image": Image.new("RGB", (32, 32), (n, 0, 0)), "text": f"shade {n}"} for n in range(8)]
    instruction = "What shade is it?"
    def convert_to_conversation(sample):
        conversation = [
            { "role": "user",
              "content" : [
                {"type" : "text",  "text"  : instruction},
                {"type" : "image", "image" : sample["image"]} ]
            },
            { "role" : "assistant",
              "content" : [
                {"type" : "text",  "text"  : sample["text"]} ]
            },
        ]
        return { "messages" : conversation }
    converted_dataset = [convert_to_conversation(sample) for sample in dataset]

    FastVisionModel.for_inference(model) # Enable for inference!
    image = dataset[2]["image"]
    messages = [
        {"role": "user", "content": [
            {"type": "image"},
            {"type": "text", "text": instruction}
        ]}
    ]
    input_text = tokenizer.apply_chat_template(messages, add_generation_prompt = True)
    inputs = tokenizer(
        image,
        input_text,
        add_special_tokens = False,
        return_tensors = "pt",
    ).to("cuda")
    from transformers import TextStreamer
    text_streamer = TextStreamer(tokenizer, skip_prompt = True)
    _ = model.generate(**inputs, streamer = text_streamer, max_new_tokens = 4,
                       use_cache = True, temperature = 1.5, min_p = 0.1)

    from unsloth.trainer import UnslothVisionDataCollator
    from trl import SFTTrainer, SFTConfig
    FastVisionModel.for_training(model) # Enable for training!
    trainer = SFTTrainer(
        model = model,
        tokenizer = tokenizer,
        data_collator = UnslothVisionDataCollator(model, tokenizer), # Must use!
        train_dataset = converted_dataset,
        args = SFTConfig(
            per_device_train_batch_size = 2,
            gradient_accumulation_steps = 2,
            warmup_steps = 1,
            max_steps = 2,
            learning_rate = 2e-3,
            logging_steps = 1,
            optim = "adamw_8bit",
            weight_decay = 0.01,
            lr_scheduler_type = "linear",
            seed = 3407,
            output_dir = sys.argv[2] + "/outputs",
            report_to = "none",     # For Weights and Biases
            # You MUST put the below items for vision finetuning:
            remove_unused_columns = False,
            dataset_text_field = "",
            dataset_kwargs = {"skip_prepare_dataset": True},
            dataset_num_proc = 4,
            max_seq_length = 2048,
        ),
    )
    trainer_stats = trainer.train()
    model.save_pretrained(sys.argv[2] + "/lora_model") # Local saving
    tokenizer.save_pretrained(sys.argv[2] + "/lora_model")
    if True:
        from unsloth import FastVisionModel
        model, tokenizer = FastVisionModel.from_pretrained(
            model_name = sys.argv[2] + "/lora_model", # YOUR MODEL YOU USED FOR TRAINING
            load_in_4bit = True, # Set to False for 16bit LoRA
        )
        FastVisionModel.for_inference(model) # Enable for inference!
    _ = model.generate(**inputs, max_new_tokens = 4, use_cache = True)
    print("DONE", trainer_stats.training_loss)
"""

OLLAMA = """
    import sys
    from unsloth import FastModel, is_bfloat16_supported, to_sharegpt, standardize_sharegpt, apply_chat_template
    model, tokenizer = FastModel.from_pretrained(
        model_name = sys.argv[1], max_seq_length = 256, load_in_4bit = True, load_in_8bit = False, full_finetuning = False,
    )
    model = FastModel.get_peft_model(
        model,
        finetune_vision_layers     = False, # Turn off for just text!
        finetune_language_layers   = True,  # Should leave on!
        finetune_attention_modules = True,  # Attention good for GRPO
        finetune_mlp_modules       = True,  # Should leave on always!
        r = 8, lora_alpha = 8, lora_dropout = 0, bias = "none", random_state = 3407,
    )
    from datasets import Dataset
    dataset = Dataset.from_list([
        {"instruction": f"Add 1 to {n}.", "input": "" if n % 2 else "Quickly.", "output": str(n + 1)} for n in range(8)
    ])
    dataset = to_sharegpt(
        dataset,
        merged_prompt = "{instruction}[[\\nYour input is:\\n{input}]]",
        output_column_name = "output",
        conversation_extension = 2, # Select more to handle longer conversations
    )
    dataset = standardize_sharegpt(dataset)
    chat_template = '''Below are some instructions that describe some tasks.

    ### Instruction:
    {INPUT}

    ### Response:
    {OUTPUT}'''
    dataset = apply_chat_template(
        dataset,
        tokenizer = tokenizer,
        chat_template = chat_template,
        # default_system_message = "You are a helpful assistant", << [OPTIONAL]
    )
    assert dataset[0]["text"].count("### Response:") == 2
    from trl import SFTTrainer, SFTConfig
    trainer = SFTTrainer(
        model = model,
        tokenizer = tokenizer,
        train_dataset = dataset,
        eval_dataset = None, # Can set up evaluation!
        args = SFTConfig(
            dataset_text_field = "text",
            per_device_train_batch_size = 2,
            gradient_accumulation_steps = 1, # Use GA to mimic batch size!
            warmup_ratio = 0.1,
            max_steps = 2,
            learning_rate = 2e-4,
            logging_steps = 1,
            optim = "adamw_8bit",
            fp16 = not is_bfloat16_supported(),
            bf16 = is_bfloat16_supported(),
            packing = True,
            report_to = "none",
            output_dir = sys.argv[2],
        ),
    )
    trainer.train()
    messages = [{"role": "user", "content": "Add 1 to 3."}]
    input_ids = tokenizer.apply_chat_template(messages, add_generation_prompt = True, return_tensors = "pt").to("cuda")
    from transformers import TextStreamer
    _ = model.generate(input_ids, streamer = TextStreamer(tokenizer), max_new_tokens = 4, pad_token_id = tokenizer.eos_token_id)
    model.save_pretrained_gguf(sys.argv[2] + "/model", tokenizer, quantization_method = "q4_k_m")
    print(tokenizer._ollama_modelfile)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.save_tiny("llama3", tmp_path_factory.mktemp("model"))


def run(tmp_path, capsys, source, *arguments):
    """The standard output of a script run by the runner in this process."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(source))
    assert compat.main([str(script), *map(str, arguments)]) == 0
    return capsys.readouterr().out


def write_rows(path):
    turns = [
        [{"from": "human", "value": f"What is {n} plus 1?"}, {"from": "gpt", "value": f"It is {n + 1}."}] for n in range(12)
    ]
    path.write_text("\n".join(json.dumps({"conversations": rows}) for rows in turns))
    return path


@pytest.mark.filterwarnings("ignore")
def test_sft_script(tmp_path, checkpoint):
    """As its own process, by the command that the documentation names."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SFT))
    rows = write_rows(tmp_path / "rows.jsonl")
    command = [sys.executable, "-m", "luthier.compat.unsloth", script, checkpoint, rows, tmp_path]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert f"DONE {script}" in shown.stdout and "FROM " in shown.stdout
    for left_out in ("overwrite_output_dir=True", "maximum_memory_usage=0.5"):
        assert f"UserWarning: {left_out} is left out: " in shown.stderr

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert not (merged.model.layers[0].mlp.up_proj.weight == file.get_tensor("model.layers.0.mlp.up_proj.weight")).all()
    assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token == tiny.END
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()
    assert len(list((tmp_path / "gguf").glob("*.gguf"))) == 2


def test_continued_pretraining_script(tmp_path, capsys, checkpoint):
    with pytest.warns(UserWarning, match="embed_tokens and lm_head in target_modules"):
        shown = run(tmp_path, capsys, CONTINUED_PRETRAINING, checkpoint, tmp_path)
    assert "DONE 2" in shown
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_grpo_script(tmp_path, capsys, checkpoint):
    with pytest.warns(UserWarning) as warned:
        shown = run(tmp_path, capsys, GRPO, checkpoint, tmp_path)
    texts = [str(entry.message) for entry in warned]
    assert any("vLLM is not installed" in text for text in texts)
    assert any("per_device_train_batch_size=4 is used" in text for text in texts)
    assert shown.splitlines()[-1].startswith("DONE [")
    assert (tmp_path / "outputs" / "checkpoint-2" / "adapter_model.safetensors").exists()


def test_vision_script(tmp_path, capsys):
    tiny_vision = pytest.importorskip("tiny_vision")
    model = tiny_vision.save_tiny_vision("qwen2_5_vl", tmp_path / "model")
    assert "DONE" in run(tmp_path, capsys, VISION, model, tmp_path)


def test_ollama_script(tmp_path, capsys, checkpoint):
    assert "FROM ./model-Q4_K_M.gguf" in run(tmp_path, capsys, OLLAMA, checkpoint, tmp_path)


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("from unsloth import FastLanguageModle", "Did you mean 'FastLanguageModel'"),
        ("from unsloth import FastLlamaModel", "Use instead: FastLanguageModel"),
        ("from unsloth_zoo.vision_utils import process_vision_info", "Use instead: UnslothVisionDataCollator"),
        ("import unsloth; unsloth.save_to_gguf", "Use instead: model.save_pretrained_gguf"),
        ("import unsloth.kernels", "Use instead: luthier.accelerate"),
        ("from unsloth.chat_template import get_chat_template", "Did you mean 'unsloth.chat_templates'"),
        ("from vllm import LLM", "Use instead: model.fast_generate"),
    ],
)
def test_what_is_missing_says_what_to_use(tmp_path, capsys, line, advice):
    with pytest.raises(ImportError) as raised:
        run(tmp_path, capsys, line)
    assert advice in str(raised.value)


def test_every_module_and_name_can_be_imported(tmp_path, capsys):
    lines = [f"from {module} import {name}" for module, names in compat.MODULES.items() for name in names]
    lines += ["from unsloth import chat_templates, save, trainer, tokenizer_utils", "import unsloth_zoo.llama_cpp"]
    lines += ["import unsloth", "print(unsloth.__version__, unsloth.chat_templates.get_chat_template is get_chat_template)"]
    assert run(tmp_path, capsys, "\n".join(lines)).split()[1] == "True"


def test_nothing_is_left_behind(tmp_path, capsys):
    script = """
        import sys, trl, transformers, unsloth, vllm
        assert trl.SFTTrainer.__module__ == transformers.TrainingArguments.__module__ == "luthier.compat.unsloth"
        sys.exit(7)
    """
    before = state()
    with pytest.raises(SystemExit) as raised:
        run(tmp_path, capsys, script + "\n        # cuda")
    assert raised.value.code == 7
    assert state() == before
    assert "unsloth" not in sys.modules and "vllm" not in sys.modules


def state():
    import torch
    import transformers
    import trl
    from transformers import PreTrainedTokenizerBase as Tokenizer

    of_modules = (trl.SFTTrainer, trl.trainer.GRPOConfig, transformers.TrainingArguments, torch.cuda.get_device_properties)
    return (*of_modules, Tokenizer.apply_chat_template, list(sys.meta_path), list(sys.path), list(sys.argv))


def test_import_changes_nothing():
    probe = """
        import sys, torch, transformers, trl
        import luthier.model  # puts the finder there that repairs torchvision
        def state():
            names = trl.SFTTrainer, trl.SFTConfig, trl.GRPOTrainer, trl.GRPOConfig, transformers.TrainingArguments
            return *names, transformers.PreTrainedTokenizerBase.apply_chat_template, tuple(sys.meta_path), tuple(sys.path)
        before = state()
        import luthier.compat.unsloth
        print(state() == before, [name for name in sys.modules if name.split(".")[0] in ("unsloth", "unsloth_zoo", "vllm")])
    """
    shown = subprocess.run([sys.executable, "-c", textwrap.dedent(probe)], capture_output=True, text=True)
    assert shown.stdout.strip() == "True []", shown.stderr


def test_usage(tmp_path, capsys):
    assert compat.main([]) == 2 and compat.main(["--help"]) == 0
    assert "script.py [args]" in capsys.readouterr().out
    assert compat.main([str(tmp_path / "none.py")]) == 2
    assert "none.py" in capsys.readouterr().err


def test_arguments_of_other_versions():
    with pytest.warns(UserWarning, match="save_safetensors=True is left out: safetensors are written, always"):
        args = compat.SFTConfig(
            output_dir="x", evaluation_strategy="steps", max_seq_length=77, save_safetensors=True, eval_steps=5
        )
    assert (args.eval_strategy, args.max_length) == ("steps", 77)
    with pytest.raises(TypeError, match="learning_rate"):
        compat.SFTConfig(learning_rat=1e-4)


def test_sampling_parameters_of_vllm():
    class Theirs:  # any object with the fields of vLLM's SamplingParams
        temperature, top_p, top_k, max_tokens, stop, structured_outputs = 0.5, 0.9, -1, 7, ["."], None

    ours = compat._sampling(Theirs())
    assert (ours.temperature, ours.top_p, ours.top_k, ours.max_tokens, ours.stop) == (0.5, 0.9, 0, 7, ["."])


@pytest.mark.skipif(compat.torch.cuda.is_available(), reason="cuda is cuda here")
def test_cuda_is_the_cpu_without_a_gpu(tmp_path, capsys):
    script = """
        import torch
        from transformers import BatchEncoding
        ids = BatchEncoding({"input_ids": torch.ones(1, 2)}).to("cuda")["input_ids"]
        layer = torch.nn.Linear(2, 2).to("cuda").cuda()
        made = torch.zeros(2, device="cuda:0") + layer(ids.to(torch.device("cuda"))).cuda()
        print(made.device, ids.to(torch.float64).dtype)
    """
    assert run(tmp_path, capsys, script).split() == ["cpu", "torch.float64"]
