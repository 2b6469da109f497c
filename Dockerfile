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
COPY --chown=afinar Makefile requirements.lock ./
RUN PIP_NO_CACHE_DIR=1 make dependencies

COPY --chown=afinar . .
# The environment is that of this lock, whatever date a fresh clone gives it.
RUN touch .venv/.installed && make setup
ENV PATH=/home/afinar/app/.venv/bin:$PATH
CMD ["make", "help"]
