# The environment of requirements.txt in an image, for clusters that want one (and for `container:` users):
#   docker build -t securecli-tuner . && docker run --rm -v "$PWD:/work" -w /work securecli-tuner snakemake --cores 2
# The image holds the packages and no model, no data and no results. Build with
# --build-arg TORCH=torch==2.13.0 where another build of PyTorch than PyPI's newest is wanted.
FROM python:3.12-slim-trixie

ARG TORCH="torch>=2.7,<2.14"
RUN apt-get update \
 && apt-get install --yes --no-install-recommends git make libgomp1 \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/securecli-tuner
COPY requirements.txt constraints.txt ./
RUN pip install --no-cache-dir --disable-pip-version-check "$TORCH" -c constraints.txt -r requirements.txt
# Nothing in it needs root.
RUN useradd --create-home tuner
USER tuner
ENV PYTHONUNBUFFERED=1
CMD ["snakemake", "--help"]
