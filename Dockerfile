# Everything from the lock, for a normal user. Weights, runs and tokens are never part of the image.
ARG BASE_IMAGE=python:3.11-slim-bookworm
FROM ${BASE_IMAGE}

# make is the front door.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends make \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home afinar

USER afinar
WORKDIR /home/afinar/app

# The environment first: it changes seldom and takes longest.
COPY --chown=afinar pyproject.toml requirements.lock README.md LICENSE Makefile ./
COPY --chown=afinar launcher/__init__.py launcher/
COPY --chown=afinar serve/__init__.py serve/
RUN make setup && .venv/bin/python -m pip cache purge

COPY --chown=afinar . .
ENV PATH=/home/afinar/app/.venv/bin:$PATH
CMD ["make", "help"]
