"""The paper: patches, positions, masking, targets, Transformer, encoder, decoder, autoencoder and classifier."""
