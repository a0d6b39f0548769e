"""Array types that many rooms share, named after what their numbers mean."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Bytes of a file or of weights.
Bytes = npt.NDArray[np.uint8]
# Slots, or the slot of every neuron.
Slots = npt.NDArray[np.int32]
# The neuron in every slot: a permutation of 0..n-1.
Order = npt.NDArray[np.int32]
# Neurons, or counts of neurons.
Neurons = npt.NDArray[np.int32]
# Offsets and sizes in files, in bytes.
Offsets = npt.NDArray[np.int64]
