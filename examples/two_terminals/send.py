"""Sends 10 emails, which are limited, and then 5 jobs that are not. See tasks.py."""

from tasks import resize, send_email

for number in range(10):
    send_email.delay(f"user{number}@example.com")
for number in range(5):
    resize.delay(f"cat{number}.png")
print("Sent 10 emails and 5 pictures; look at the worker.")
