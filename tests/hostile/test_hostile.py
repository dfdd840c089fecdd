"""Every area of hostile inputs in its short form; `launch/soak.sh` runs the long one."""

import pytest
import tally


@pytest.mark.parametrize("area", tally.AREAS)
def test_hostile_inputs_are_survived(area, tmp_path):
    found = tally.run(area, tmp_path)
    print(found)
    assert found.tried and not found.failures, "\n".join(found.failures[:10])
