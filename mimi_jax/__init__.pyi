# The public names, each listed once. `__init__.py` imports a name when it is first used.

# The codec
from .config import MimiConfig as MimiConfig
from .model import Mimi as Mimi
from .model import encode as encode
from .model import decode as decode
from .boundary import pad_to_frame as pad_to_frame

# Streams
from .model import EncoderState as EncoderState
from .model import DecoderState as DecoderState
from .model import encode_step as encode_step
from .model import decode_step as decode_step
from .streams.push import StreamingEncoder as StreamingEncoder
from .streams.push import StreamingDecoder as StreamingDecoder
from .streams.rows import reset_rows as reset_rows
from .streams.rows import take_rows as take_rows
from .streams.rows import put_rows as put_rows
from .streams.saved import save_state as save_state
from .streams.saved import load_state as load_state

# Files
from .files.audio import load_audio as load_audio
from .files.audio import save_audio as save_audio
from .files.batches import pad_batch as pad_batch
from .files.batches import bucket_length as bucket_length
from .files.codes import CodeFile as CodeFile
from .files.codes import load_codes as load_codes
from .files.codes import save_codes as save_codes

__version__: str
