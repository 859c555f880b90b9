# Draws every figure and judges every claim from the committed records; runs no model, and needs none.
#   docker build -t recon . && docker run --name figures recon && docker cp figures:/home/recon/recon/figures figures-drawn
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends git && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home recon
ENV PIP_NO_CACHE_DIR=1
USER recon
WORKDIR /home/recon/recon
COPY --chown=recon . .
# Sets up what `./run_all.sh figures` needs, so that a container starts at once.
RUN ./run_all.sh figures && rm -rf build
CMD ["./run_all.sh", "figures"]
