"""The metrics, and what those beside allocated memory are a regression on."""

METRICS = ("allocated", "reserved", "device", "required")
"""What the README's glossary explains; each a peak over one run [bytes]."""
METRIC_FEATURES = ("1", "peak", "vae_encoder_blocks", "unet", "vae_decoder_blocks")
"""What reserved, device and required are linear in, above the weights [bytes]: a constant, the peak, three stages."""
