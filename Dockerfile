# The environment of `make run` in an image, for clusters that want one (and for `container:` users):
#   docker build -t securecli-tuner . && docker run --rm -v "$PWD:/work" -w /work securecli-tuner snakemake --cores 2
# The image holds the packages and no model, no data and no results. Build with
# --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu where PyTorch without CUDA is wanted.
FROM python:3.12-slim-trixie

ARG PIP_EXTRA_INDEX_URL=""
RUN apt-get update \
 && apt-get install --yes --no-install-recommends git make libgomp1 \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/securecli-tuner
COPY pyproject.toml uv.lock ./
COPY envs/install.py envs/
RUN python envs/install.py /opt/venv --group run && rm -rf /root/.cache
ENV PATH="/opt/venv/bin:$PATH"
# Nothing in it needs root.
RUN useradd --create-home tuner
USER tuner
ENV PYTHONUNBUFFERED=1
CMD ["snakemake", "--help"]
