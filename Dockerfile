# Both services in one image: `docker run foretell embedder ...`, `docker run foretell predictor ...`.
ARG PYTHON=3.12-slim

FROM python:${PYTHON} AS build
# EXTRA: cpu or gpu (which faiss). TORCH_INDEX: where torch's CPU build is; empty: PyPI's CUDA build.
ARG EXTRA=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m venv /opt/foretell
WORKDIR /src
COPY constraints.txt pyproject.toml README.md ./
COPY client client
COPY serving serving
COPY embedder embedder
COPY predictor predictor
RUN /opt/foretell/bin/pip install --no-cache-dir -c constraints.txt \
    ${TORCH_INDEX:+--extra-index-url ${TORCH_INDEX}} ./client ".[${EXTRA},train,tracing]"

FROM python:${PYTHON}
# LightGBM's trees need OpenMP's runtime.
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 1000 --create-home foretell && mkdir /data && chown foretell /data
COPY --from=build /opt/foretell /opt/foretell
ENV PATH=/opt/foretell/bin:$PATH PYTHONUNBUFFERED=1
USER foretell
VOLUME /data
ENTRYPOINT ["python", "-m"]
