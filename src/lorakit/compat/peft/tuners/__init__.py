"""The places where PEFT's users find its layers: `peft.tuners.lora`, `peft.tuners.tuners_utils`."""
