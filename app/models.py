"""Where the models that travel with the repository lie."""

from pathlib import Path

MODELS = Path(__file__).resolve().parent.parent / "models"
SHIPPED_STUDENT = MODELS / "emoji-student"
SHIPPED_TEACHER = MODELS / "emoji-teacher"
