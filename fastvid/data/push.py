"""A robot arm pushes objects about a tray, seen by a fixed camera: a BAIR-like clip generator for CPUs.

The scene is simulated by PyBullet and drawn by its software renderer: a Kuka iiwa with a closed gripper, a tray, and
four to six objects (boxes, balls, cylinders and odd shapes). The arm follows scripted legs: most aim through an object,
some at a random point, some are raised. The odd shapes are pybullet_data's 1,000 procedural ones: train clips draw from
the first 900, test clips from the last 100.
"""

import colorsys
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvid.data.seeds import SPLITS, check_request, split_of
from fastvid.errors import DataError

__all__ = ["SPLITS", "VERSION", "PushSimulator"]

VERSION = 1
FPS = 10.0
_SHAPES = {"train": (0, 900), "test": (900, 1000)}
_OVERSAMPLE = 2  # drawn at twice the size and averaged: the renderer itself has jagged edges
_STEPS, _CHUNKS = 16, 4  # physics steps of 1/160 s a frame, and motor commands a frame

_TRAY = (0.65, 0.0)  # metres, as are all lengths here; the arm stands at the origin and the camera looks at it
_REACH = 0.15  # the hand stays this far from the tray's centre along each axis, clear of the walls
_LOW, _HIGH = 0.315, 0.42  # height of the last arm link; the fingertips hang 0.29 lower
_HAND = 6
_REST = (0.0, 0.41, 0.0, -1.59, 0.0, 1.14, 0.0)
_DOWN = (0.0, -1.0, 0.0, 0.0)  # quaternion of a hand that points to the floor


class PushSimulator:
    """A running simulation that makes one clip after another; use it in a `with` block.

    size:    (H, W), at least 16 pixels a side; the camera sees more to the sides of a wide frame.
    Returns: after each clip, `last_positions` float32 [T, 3] holds the hand's place and `last_actions` float32 [T, 3]
             the move that is commanded after each frame; both in metres, world axes (x away from the arm's foot, y to
             the left of the arm, z up).
    Raises:  DataError for too small a size, and on entering where pybullet is missing.
    Source:  scene in the manner of BAIR robot pushing, Ebert et al. 2017, arXiv:1710.05268; models of pybullet_data.
    """

    def __init__(self, size: tuple[int, int] = (64, 64)) -> None:
        check_request("push", 1, size)
        self.size = size
        self.last_actions = self.last_positions = torch.empty(0, 3)
        self._bullet: Any = None

    def __enter__(self) -> "PushSimulator":
        try:
            import pybullet
            import pybullet_data
        except ImportError as error:
            raise DataError(
                "push: wanted pybullet for the robot arm; pip install pybullet (wheels exist up to Python 3.11)"
            ) from error
        self._assets = Path(pybullet_data.getDataPath())
        self._bullet = _Bullet(pybullet)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bullet.disconnect()
        self._bullet = None

    def clip(self, seed: int, frames: int = 30) -> Tensor:
        """Simulate one clip; the same seed gives the same bytes in any process and any order.

        seed:    in one of SPLITS. frames: T, at least 1, 0.1 s apart.
        Returns: uint8 [T, H, W, 3], RGB, 0..255; a shorter clip is the start of a longer one.
        Raises:  DataError for a seed outside the splits, no frames, or use outside a `with` block.
        Source:  see the class.
        """
        check_request("push", frames, self.size)
        shapes = _SHAPES[split_of("push", seed)]
        if self._bullet is None:
            raise DataError("push: the simulator is not running; use `with PushSimulator() as arm: arm.clip(seed)`.")
        draws = _Draws(seed)
        arm, objects = self._set_up(draws, shapes)
        target = np.array(self._bullet.getLinkState(arm, _HAND)[4])
        moves = self._moves(draws, objects, target)
        video, positions, actions = [], [], []
        for t in range(frames):
            if t:
                target = target + actions[-1]
                self._drive(arm, target)
            video.append(self._draw())
            positions.append(self._bullet.getLinkState(arm, _HAND)[4])
            actions.append(next(moves))
        self.last_positions = torch.tensor(positions, dtype=torch.float32)
        self.last_actions = torch.from_numpy(np.stack(actions).astype(np.float32))
        return torch.from_numpy(np.stack(video))

    def _set_up(self, draws: "_Draws", shapes: tuple[int, int]) -> tuple[int, list[int]]:
        bullet = self._bullet
        bullet.resetSimulation()
        bullet.setPhysicsEngineParameter(deterministicOverlappingPairs=1)
        bullet.setTimeStep(0.1 / _STEPS)
        bullet.setGravity(0, 0, -9.8)
        ground = bullet.createVisualShape(bullet.GEOM_BOX, halfExtents=(3, 3, 0.05), rgbaColor=(0.72, 0.62, 0.5, 1))
        bullet.createMultiBody(baseVisualShapeIndex=ground, basePosition=(0, 0, -0.07))
        bullet.loadURDF(str(self._assets / "tray/traybox.urdf"), (*_TRAY, 0))
        # places on a 3 x 3 grid without repetition: one for the hand, the others for the objects, so none overlap
        cells = [(_TRAY[0] + 0.11 * (i // 3 - 1), _TRAY[1] + 0.11 * (i % 3 - 1)) for i in draws.order(9)]
        arm = self._add_arm(cells.pop())
        colours = draws.order(8)
        objects = [self._add_object(draws, shapes, cells.pop(), colours.pop()) for _ in range(draws.integer(4, 7))]
        for _ in range(80):
            bullet.stepSimulation()
        return arm, objects

    def _add_arm(self, place: tuple[float, float]) -> int:
        bullet = self._bullet
        arm = bullet.loadSDF(str(self._assets / "kuka_iiwa/kuka_with_gripper2.sdf"))[0]
        for joint, angle in enumerate(_REST):
            bullet.resetJointState(arm, joint, angle)
        # inverse kinematics starts from the present pose: a few rounds settle it on the wanted one
        for _ in range(10):
            for joint, angle in enumerate(self._joints(arm, (*place, _LOW))):
                bullet.resetJointState(arm, joint, angle)
        for joint in range(bullet.getNumJoints(arm)):
            held = bullet.getJointState(arm, joint)[0]
            bullet.setJointMotorControl2(arm, joint, bullet.POSITION_CONTROL, held, force=300 if joint < 8 else 10)
        return arm

    def _add_object(self, draws: "_Draws", shapes: tuple[int, int], place: tuple[float, float], colour: int) -> int:
        bullet = self._bullet
        kind = draws.integer(0, 5)
        a, b, c = (draws.uniform(0.02, 0.032) for _ in range(3))
        turn = bullet.getQuaternionFromEuler((0, 0, draws.uniform(0, math.pi)))
        number = draws.integer(*shapes)
        if kind > 2:  # two of five: the odd shapes are what sets train and test apart
            path = self._assets / f"random_urdfs/{number:03d}/{number:03d}.urdf"
            body = bullet.loadURDF(str(path), (*place, 0.07), turn)
        else:
            if kind == 0:
                form = {"shapeType": bullet.GEOM_BOX, "halfExtents": (a, b, c)}
            elif kind == 1:
                form = {"shapeType": bullet.GEOM_SPHERE, "radius": a + 0.005}
            else:
                form = {"shapeType": bullet.GEOM_CYLINDER, "radius": a, "height": 2 * b}
            shape = bullet.createCollisionShape(**form)
            body = bullet.createMultiBody(0.1, shape, basePosition=(*place, 0.06), baseOrientation=turn)
        # rolling friction: without it a pushed ball would roll for ever
        bullet.changeDynamics(body, -1, lateralFriction=0.6, rollingFriction=0.002, spinningFriction=0.002)
        hue = colour / 8 + draws.uniform(-0.02, 0.02)
        rgb = colorsys.hsv_to_rgb(hue % 1.0, draws.uniform(0.75, 1.0), draws.uniform(0.75, 1.0))
        bullet.changeVisualShape(body, -1, rgbaColor=(*rgb, 1))
        return body

    def _moves(self, draws: "_Draws", objects: list[int], place: np.ndarray) -> Iterator[np.ndarray]:
        """Moves of the hand, one a frame, leg after leg; a leg's aim is chosen when the leg starts."""
        while True:
            aim = np.array([_TRAY[0] + draws.uniform(-_REACH, _REACH), _TRAY[1] + draws.uniform(-_REACH, _REACH), _LOW])
            thing, beyond = objects[draws.integer(0, len(objects))], draws.uniform(0.06, 0.14)
            kind, speed = draws.uniform(0, 1), draws.uniform(0.02, 0.045)
            if kind < 0.1:
                aim[2] = _HIGH
            elif kind < 0.85:
                there = np.array(self._bullet.getBasePositionAndOrientation(thing)[0][:2])
                way = there - place[:2]
                aim[:2] = there + way * beyond / max(float(np.hypot(*way)), 0.01)
                aim[:2] = np.clip(aim[:2], np.array(_TRAY) - _REACH, np.array(_TRAY) + _REACH)
            frames = max(1, math.ceil(float(np.linalg.norm(aim - place)) / speed))
            step = (aim - place) / frames
            for _ in range(frames):
                place = place + step
                yield step

    def _drive(self, arm: int, target: np.ndarray) -> None:
        bullet = self._bullet
        start = np.array([state[0] for state in bullet.getJointStates(arm, range(7))])
        end = np.array(self._joints(arm, target))
        for chunk in range(1, _CHUNKS + 1):
            angles = start + (end - start) * chunk / _CHUNKS
            bullet.setJointMotorControlArray(
                arm, range(7), bullet.POSITION_CONTROL, angles.tolist(), forces=[300] * 7, positionGains=[0.3] * 7
            )
            for _ in range(_STEPS // _CHUNKS):
                bullet.stepSimulation()

    def _joints(self, arm: int, place: Any) -> list[float]:
        bullet = self._bullet
        angles = bullet.calculateInverseKinematics(
            arm, _HAND, list(place), _DOWN, maxNumIterations=50, residualThreshold=1e-5
        )
        return list(angles[:7])

    def _draw(self) -> np.ndarray:
        bullet, (H, W), n = self._bullet, self.size, _OVERSAMPLE
        view = bullet.computeViewMatrix((1.22, 0, 0.66), (0.63, 0, 0.05), (0, 0, 1))
        lens = bullet.computeProjectionMatrixFOV(41, W / H, 0.1, 4)
        # without shadows: they double the time of a picture
        options = {"renderer": bullet.ER_TINY_RENDERER, "flags": bullet.ER_NO_SEGMENTATION_MASK, "shadow": 0}
        picture = bullet.getCameraImage(W * n, H * n, view, lens, **options)[2]
        fine = np.asarray(picture, dtype=np.uint16).reshape(H, n, W, n, 4)[..., :3]
        return ((fine.sum(axis=(1, 3)) + n * n // 2) // (n * n)).astype(np.uint8)  # [H, W, 3]


class _Bullet:
    """One connection to PyBullet: every call goes to this simulation, so several may live in one process."""

    def __init__(self, pybullet: Any) -> None:
        self._pybullet = pybullet
        self._client = pybullet.connect(pybullet.DIRECT)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._pybullet, name)
        return partial(value, physicsClientId=self._client) if callable(value) else value


class _Draws:
    """Random numbers from a seed, made of raw counter-based bits: numpy promises their stream for ever."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.Philox(key=[seed, VERSION])

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * (int(self._bits.random_raw()) >> 11) / 2**53

    def integer(self, low: int, high: int) -> int:
        return low + (int(self._bits.random_raw()) >> 11) % (high - low)

    def order(self, n: int) -> list[int]:
        return sorted(range(n), key=[int(self._bits.random_raw()) for _ in range(n)].__getitem__)
