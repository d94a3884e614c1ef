"""The layers: pure functions of their parameters, a state and an input.

    module            the base of all layers
    streaming         what a layer is: `init_state`, `step(state, x)`, `__call__`
    conv              convolutions and transposed convolutions
    attention         windowed attention with rotary positions
    transformer_step  a Transformer's step of few rows, for XLA:GPU
    transformer       the Transformers on either side of the quantizer
    few_passes        the layers next to the waveform, for XLA:GPU
    polyphase         layers with several positions a row, for TPUs
    pallas_stages     the layers next to the waveform as device kernels, for TPUs
    seanet            the convolutional encoder and decoder
    quantizer         the residual vector quantizer

Reading order is import order. `transformer_step`, `few_passes`, `polyphase` and `pallas_stages` compute the
same numbers in other ways: they can be skipped.
"""
