"""How good decoded audio is, in numbers and in pictures.

metrics      SI-SDR
spectrum     the mel scale, spectrograms and a distance of spectra
evaluation   measures by the number of codebooks
picture      what the codec did to a clip, drawn
"""
