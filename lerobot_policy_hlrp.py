"""LeRobot finds plugins by distributions named `lerobot_policy_*` and imports a module of that name: this one."""

import lerobot_hlrp  # noqa: F401
