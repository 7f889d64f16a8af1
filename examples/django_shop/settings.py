"""A minimal Django project's settings. Celery takes those with the prefix CELERY_."""

SECRET_KEY = "only an example"  # noqa: S105
INSTALLED_APPS = ["shop"]
USE_TZ = True

CELERY_BROKER_URL = "memory://"
CELERY_RESULT_BACKEND = "cache+memory://"
CELERY_RATE_LIMITER_LIMITS = {
    "shop.tasks.send_*": {"rate": "120/m", "burst": 2},
}
