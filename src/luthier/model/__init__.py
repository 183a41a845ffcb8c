"""Models: loading, adapters, making them fast, merging and saving. Everything here stands on transformers.

Where to start reading, and what comes next:

    loading    load, vision       source, checkpoint, precision, rope, tokenizer, vocab
    adapters   lora               targets
    a step     accelerate         backbone, fused_layer, read_layer, layer_blocks, blocks, head; experts, fused_experts
    memory     dial               cost, card, offload, host_memory, device_memory; memory, before anything is loaded
    graphs     graphs             graph_rules, passes, recording, arena
    saving     save, gguf_export  merge, slots, layout, shards
"""

from luthier.model.torchvision_hook import install

install()  # the modules of this package import transformers, which a torchvision that does not fit would break
