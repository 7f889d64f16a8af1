"""Facts about brokers, for both gates. It knows kombu, and no Celery."""
