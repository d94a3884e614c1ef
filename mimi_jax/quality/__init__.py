"""How good decoded audio is, in numbers and in pictures.

metrics      SI-SDR
mel          the mel scale
evaluation   measures by the number of codebooks
picture      what the codec did to a clip, drawn
"""
