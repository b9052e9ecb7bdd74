"""Networks: the masked autoencoder (`mae`, of `vit.Encoder`, `decoders` and `masking`) and classifiers (`vit`)."""
