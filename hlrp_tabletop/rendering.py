"""Antialiased drawing of a scene in plain NumPy.

Every figure is a signed distance function (negative inside, world units) that is evaluated only in the figure's
bounding box; half a pixel on both sides of its zero line is blended. Two layers are cached: the table with its places,
redrawn when the places change, and the objects on it, redrawn when one moves. Each frame adds the gripper to a copy.
"""

from collections.abc import Callable

import numpy as np

from hlrp_tabletop.font import text_mask
from hlrp_tabletop.scene import GRIPPER_RADIUS, OBJECT_RADIUS, Scene
from hlrp_tabletop.tasks import COLOURS, SHAPE_NAMES

VIEW = 1.1  # the picture shows [-VIEW, VIEW] on both axes

_TABLE = np.array((240, 237, 230), dtype=np.float32)
_RIM = np.array((206, 196, 180), dtype=np.float32)
_INK = np.array((24, 24, 28), dtype=np.float32)
_WHITE = np.array((255, 255, 255), dtype=np.float32)
_PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)
_PLACE_HALF = 0.27
_OUTLINE = 0.022
_GRIPPER_BODY = 0.12  # drawn wider than the tip that touches: a small vision model has to find it
_GRIPPER_HALO = _GRIPPER_BODY + 0.022
_SHADOW_OFFSET = np.array([0.02, -0.03])

SignedDistance = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Renderer:
    """Draws scenes at one size. Keeps the last layers, so use one renderer per environment."""

    def __init__(self, size: int):
        self.size = size
        self._pixel = 2 * VIEW / size
        centres = (np.arange(size, dtype=np.float32) + 0.5) * self._pixel - VIEW
        self._x, self._y = centres, -centres  # row 0 is the top, y = +VIEW
        self._table_key: bytes | None = None
        self._table = np.zeros((size, size, 3), dtype=np.float32)
        self._layer_key: tuple[bytes, ...] = ()
        self._layer = np.zeros((size, size, 3), dtype=np.uint8)

    def draw(self, scene: Scene) -> np.ndarray:
        """The picture of a scene, (size, size, 3) uint8, a fresh array."""
        table_key = scene.place_colours.tobytes()
        if table_key != self._table_key:
            self._table, self._table_key = self._draw_table(scene), table_key
        layer_key = (table_key, scene.positions.tobytes(), scene.colours.tobytes(), scene.shapes.tobytes())
        if layer_key != self._layer_key:
            self._layer, self._layer_key = self._draw_objects(scene), layer_key
        image = self._layer.copy()
        self._draw_gripper(image, scene.gripper)
        return image

    def pixel_of(self, point: np.ndarray) -> tuple[int, int]:
        """(row, column) of a world point (2,), kept inside the picture."""
        column, row = (point[0] + VIEW) / self._pixel, (VIEW - point[1]) / self._pixel
        return min(max(int(row), 0), self.size - 1), min(max(int(column), 0), self.size - 1)

    def _draw_table(self, scene: Scene) -> np.ndarray:
        """The table with its places, (size, size, 3) float32."""
        canvas = np.empty((self.size, self.size, 3), dtype=np.float32)
        canvas[:] = _RIM
        self._fill(canvas, np.zeros(2), VIEW, _rounded_box(1.06, 1.06, 0.08), (0.0, _TABLE))
        for position, colour in zip(scene.place_positions, scene.place_colours, strict=True):
            self._draw_place(canvas, position, _PALETTE[colour])
        return canvas

    def _draw_objects(self, scene: Scene) -> np.ndarray:
        """The table with its objects, (size, size, 3) uint8."""
        canvas = self._table.copy()
        for position, colour, shape in zip(scene.positions, scene.colours, scene.shapes, strict=True):
            self._draw_object(canvas, position, _PALETTE[colour], _SHAPES[SHAPE_NAMES[shape]])
        return np.rint(canvas).astype(np.uint8)

    def _draw_place(self, canvas: np.ndarray, position: np.ndarray, colour: np.ndarray) -> None:
        distance = _rounded_box(_PLACE_HALF, _PLACE_HALF, 0.06)
        self._fill(canvas, position, _PLACE_HALF, distance, (0.0, colour), (0.05, 0.30 * colour + 0.70 * _TABLE))

    def _draw_object(
        self, canvas: np.ndarray, position: np.ndarray, colour: np.ndarray, distance: SignedDistance
    ) -> None:
        extent = 1.5 * OBJECT_RADIUS
        self._fill(canvas, position + _SHADOW_OFFSET, extent, distance, (0.0, _INK), opacity=0.22, softness=0.03)
        self._fill(canvas, position, extent, distance, (0.0, 0.62 * colour), (_OUTLINE, colour))

    def _draw_gripper(self, image: np.ndarray, position: np.ndarray) -> None:
        """A dark disc with a bright tip, on a white halo that keeps it visible on any colour."""
        rings = ((_GRIPPER_BODY, _INK), (0.5 * GRIPPER_RADIUS, _WHITE))
        inner = [(_GRIPPER_HALO - radius, colour) for radius, colour in rings]
        self._fill(image, position, _GRIPPER_HALO, _disc(_GRIPPER_HALO), (0.0, _WHITE), *inner)

    def _fill(
        self,
        image: np.ndarray,
        centre: np.ndarray,
        extent: float,
        distance: SignedDistance,
        *layers: tuple[float, np.ndarray],
        opacity: float = 1.0,
        softness: float = 0.0,
    ) -> None:
        """Blends layers into `image` (float or uint8), in place: each is (inset, colour), where colour covers what lies
        deeper than `inset` inside the figure. `distance` takes coordinates from the centre, `extent` bounds the figure.
        """
        reach = extent + softness + self._pixel
        columns = self._window(centre[0] + VIEW, reach)
        rows = self._window(VIEW - centre[1], reach)
        x = self._x[columns] - np.float32(centre[0])
        y = self._y[rows] - np.float32(centre[1])
        patch = image[rows, columns]
        blended = patch
        depth = 0.5 - distance(x[None, :], y[:, None])[..., None] / (self._pixel + 2 * softness)
        for inset, colour in layers:
            cover = np.clip(depth - inset / self._pixel, 0.0, opacity)
            blended = blended + cover * (colour - blended)
        patch[...] = np.rint(blended) if image.dtype == np.uint8 else blended

    def _window(self, offset: float, reach: float) -> slice:
        """Pixels within `reach` of `offset` (world units from the picture's left or top edge)."""
        low = int(np.floor((offset - reach) / self._pixel))
        high = int(np.ceil((offset + reach) / self._pixel))
        return slice(max(low, 0), max(min(high, self.size), 0))


def caption_image(image: np.ndarray, text: str, height: int = 48) -> np.ndarray:
    """Adds a strip with `text` below an image: (H, W, 3) uint8 -> (H + height, W, 3) uint8."""
    strip = np.full((height, image.shape[1], 3), 250, dtype=np.uint8)
    strip[text_mask(text, image.shape[1], height)] = _INK.astype(np.uint8)
    return np.concatenate([image, strip])


def _disc(radius: float) -> SignedDistance:
    return lambda x, y: np.sqrt(x * x + y * y) - radius


def _rounded_box(half_width: float, half_height: float, rounding: float) -> SignedDistance:
    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        over_x = np.abs(x) - (half_width - rounding)
        over_y = np.abs(y) - (half_height - rounding)
        outside = np.sqrt(np.maximum(over_x, 0) ** 2 + np.maximum(over_y, 0) ** 2)
        return outside + np.minimum(np.maximum(over_x, over_y), 0) - rounding

    return distance


def _triangle(inradius: float) -> SignedDistance:
    """Equilateral, pointing up, its centroid at the origin."""
    half_root_three = np.float32(np.sqrt(3) / 2)

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.maximum(half_root_three * np.abs(x) + 0.5 * y, -y) - inradius

    return distance


def _cross(half_length: float, half_width: float) -> SignedDistance:
    lying, standing = _rounded_box(half_length, half_width, 0.02), _rounded_box(half_width, half_length, 0.02)
    return lambda x, y: np.minimum(lying(x, y), standing(x, y))


# All shapes are sized around the same circle of OBJECT_RADIUS, which is what counts for contact and success.
_SHAPES: dict[str, SignedDistance] = {
    "disc": _disc(OBJECT_RADIUS),
    "block": _rounded_box(0.90 * OBJECT_RADIUS, 0.90 * OBJECT_RADIUS, 0.03),
    "triangle": _triangle(0.70 * OBJECT_RADIUS),
    "cross": _cross(1.10 * OBJECT_RADIUS, 0.42 * OBJECT_RADIUS),
}
assert set(_SHAPES) == set(SHAPE_NAMES)
